"""Prices, balance, usage and invoices. Amounts are integers of one nano-dollar (1e-9 USD).

A price by numbers, and by a dataset that was uploaded; `dollars(price.total_nanos_usd)` is `$366.00`:

    price = await mesh.billing.estimate(
        EstimatePriceRequest(
            base_model="meta-llama/Llama-3.1-8B",
            training_kind=TRAINING_KIND_SFT_LORA,
            training_tokens=10_000_000,
            validation_tokens=1_000_000,
            epochs=3,
            evaluations=10,
        )
    )
    quote = await mesh.jobs.quote(TuningSpec(base_model="finemesh/demo-llama", training_file=file.name))
    elsewhere = await mesh.billing.estimate(request_of(quote, "together-2026"))

The terms of a price sum to its total; each has its quantity and its price of a million.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import cast

from finemesh.billing.v1 import (
    balance_pb2,
    billing_service_pb2,
    billing_service_pb2_grpc,
    invoice_pb2,
    usage_record_pb2,
)
from finemesh.tuning.v1 import tuning_service_pb2
from finemesh_client.training_kinds import training_kind
from finemesh_client.transport import Transport

NANOS_PER_DOLLAR = 1_000_000_000


def dollars(nanos_usd: int) -> str:
    """`$366.00`; amounts below a cent show all their digits."""
    sign, nanos = ("-" if nanos_usd < 0 else ""), abs(nanos_usd)
    whole, rest = divmod(nanos, NANOS_PER_DOLLAR)
    digits = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}${whole:,}.{digits}"


def request_of(
    quote: tuning_service_pb2.QuoteTuningJobResponse, price_book_version: str = ""
) -> billing_service_pb2.EstimatePriceRequest:
    """The numbers of a quote, to price them by another version or book."""
    return billing_service_pb2.EstimatePriceRequest(
        base_model=quote.spec.base_model,
        training_kind=training_kind(quote.spec),
        training_tokens=quote.counts.training_tokens,
        validation_tokens=quote.counts.validation_tokens,
        epochs=quote.spec.hyperparameters.epochs,
        evaluations=quote.spec.hyperparameters.evaluations,
        parameter_count=quote.parameter_count,
        price_book_version=price_book_version,
    )


class Billing:
    """Money of the caller's organization."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = billing_service_pb2_grpc.BillingServiceStub(transport.channel)

    async def estimate(
        self, request: billing_service_pb2.EstimatePriceRequest
    ) -> billing_service_pb2.EstimatePriceResponse:
        """The price of a job from numbers, by the code that also makes quotes, holds and bills.

        Raises InvalidRequest for a count that no job has, and for a model, method or version without a price.
        """
        answer = await self._transport.unary(self._stub.EstimatePrice, request, safe=True)
        return cast(billing_service_pb2.EstimatePriceResponse, answer)

    async def balance(self) -> balance_pb2.Balance:
        """The prepaid balance."""
        request = billing_service_pb2.GetBalanceRequest()
        return cast(
            balance_pb2.Balance, (await self._transport.unary(self._stub.GetBalance, request, safe=True)).balance
        )

    async def top_up(
        self, nanos_usd: int, *, organization: str = "", request_id: str | None = None
    ) -> balance_pb2.Balance:
        """Adds prepaid credit. Needs the operator role."""
        request = billing_service_pb2.TopUpRequest(
            organization=organization, amount_nanos_usd=nanos_usd, request_id=request_id or uuid.uuid4().hex
        )
        return cast(balance_pb2.Balance, (await self._transport.unary(self._stub.TopUp, request, safe=True)).balance)

    def usage(
        self,
        resource: str = "",
        limit: int | None = None,
        *,
        kinds: Sequence[usage_record_pb2.UsageKind.ValueType] = (),
        model: str = "",
        api_key_id: str = "",
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> AsyncIterator[usage_record_pb2.UsageRecord]:
        """Usage records of the project that match, newest first; used from `start` on and before `end`."""
        filters = billing_service_pb2.ListUsageRecordsRequest(
            resource=resource, kinds=kinds, model=model, api_key_id=api_key_id
        )
        if start is not None:
            filters.start_time.FromDatetime(start)
        if end is not None:
            filters.end_time.FromDatetime(end)
        return self._transport.pages(self._stub.ListUsageRecords, filters, "usage_records", limit)

    async def invoice(self, name: str = "") -> invoice_pb2.Invoice:
        """The invoice of a month; the running month without a name."""
        request = billing_service_pb2.GetInvoiceRequest(name=name)
        return cast(
            invoice_pb2.Invoice, (await self._transport.unary(self._stub.GetInvoice, request, safe=True)).invoice
        )

    async def job_charge(self, tuning_job: str) -> billing_service_pb2.GetJobChargeResponse:
        """A job's money from quote to settlement."""
        request = billing_service_pb2.GetJobChargeRequest(tuning_job=tuning_job)
        answer = await self._transport.unary(self._stub.GetJobCharge, request, safe=True)
        return cast(billing_service_pb2.GetJobChargeResponse, answer)
