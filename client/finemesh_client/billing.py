"""Prices, balance, usage and invoices. Amounts are integers of one nano-dollar (1e-9 USD)."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import cast

from finemesh.billing.v1 import billing_service_pb2, billing_service_pb2_grpc, money_pb2
from finemesh_client.paging import pages
from finemesh_client.transport import Transport

NANOS_PER_DOLLAR = 1_000_000_000


def dollars(nanos_usd: int) -> str:
    """`$366.00`; amounts below a cent show all their digits."""
    sign, nanos = ("-" if nanos_usd < 0 else ""), abs(nanos_usd)
    whole, rest = divmod(nanos, NANOS_PER_DOLLAR)
    digits = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}${whole:,}.{digits}"


class Billing:
    """Money of the caller's organization."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = billing_service_pb2_grpc.BillingServiceStub(transport.channel)

    async def estimate(
        self, request: billing_service_pb2.EstimatePriceRequest
    ) -> billing_service_pb2.EstimatePriceResponse:
        """The price of a job from numbers."""
        answer = await self._transport.unary(self._stub.EstimatePrice, request, safe=True)
        return cast(billing_service_pb2.EstimatePriceResponse, answer)

    async def balance(self) -> money_pb2.Balance:
        """The prepaid balance."""
        request = billing_service_pb2.GetBalanceRequest()
        return cast(money_pb2.Balance, (await self._transport.unary(self._stub.GetBalance, request, safe=True)).balance)

    async def top_up(
        self, nanos_usd: int, *, organization: str = "", request_id: str | None = None
    ) -> money_pb2.Balance:
        """Adds prepaid credit. Needs the operator role."""
        request = billing_service_pb2.TopUpRequest(
            organization=organization, amount_nanos_usd=nanos_usd, request_id=request_id or uuid.uuid4().hex
        )
        return cast(money_pb2.Balance, (await self._transport.unary(self._stub.TopUp, request, safe=True)).balance)

    def usage(self, resource: str = "", limit: int | None = None) -> AsyncIterator[money_pb2.UsageRecord]:
        """Usage records of the project, newest first."""

        async def fetch(token: str) -> billing_service_pb2.ListUsageRecordsResponse:
            request = billing_service_pb2.ListUsageRecordsRequest(resource=resource, page_token=token)
            return cast(
                billing_service_pb2.ListUsageRecordsResponse,
                await self._transport.unary(self._stub.ListUsageRecords, request, safe=True),
            )

        return pages(fetch, "usage_records", limit)

    async def invoice(self, name: str = "") -> money_pb2.Invoice:
        """The invoice of a month; the running month without a name."""
        request = billing_service_pb2.GetInvoiceRequest(name=name)
        return cast(money_pb2.Invoice, (await self._transport.unary(self._stub.GetInvoice, request, safe=True)).invoice)

    async def job_charge(self, tuning_job: str) -> billing_service_pb2.GetJobChargeResponse:
        """A job's money from quote to settlement."""
        request = billing_service_pb2.GetJobChargeRequest(tuning_job=tuning_job)
        answer = await self._transport.unary(self._stub.GetJobCharge, request, safe=True)
        return cast(billing_service_pb2.GetJobChargeResponse, answer)
