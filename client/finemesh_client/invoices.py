"""Invoices as documents, credit notes, reports of cost and exports of usage.

Amounts are integers of one nano-dollar.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import cast

from google.protobuf.timestamp_pb2 import Timestamp

from finemesh.billing.v1 import (
    billing_service_pb2,
    billing_service_pb2_grpc,
    credit_note_pb2,
    invoice_pb2,
    invoice_service_pb2_grpc,
    usage_record_pb2,
)
from finemesh.billing.v1 import invoice_service_pb2 as pb
from finemesh_client.errors import Unavailable
from finemesh_client.transport import Transport

# A PDF of very many lines takes a while to draw.
RENDER_TIMEOUT_S = 120.0


class Invoices:
    """Documents and reports of the caller's organization; closing and giving back need the operator role."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = invoice_service_pb2_grpc.InvoiceServiceStub(transport.channel)
        self._billing = billing_service_pb2_grpc.BillingServiceStub(transport.channel)

    async def name_of(self, month: str, organization: str = "") -> str:
        """The name of the invoice of a month such as `2026-11`; the caller's own without an organization."""
        if not organization:
            request = billing_service_pb2.GetBalanceRequest()
            answer = await self._transport.unary(self._billing.GetBalance, request, safe=True)
            organization = answer.balance.organization
        return f"{organization}/invoices/{month}"

    def list(self, limit: int | None = None) -> AsyncIterator[invoice_pb2.Invoice]:
        """Invoices without their lines, newest first."""
        return self._transport.pages(self._stub.ListInvoices, pb.ListInvoicesRequest(), "invoices", limit)

    async def render(self, name: str, kind: pb.InvoiceFormat.ValueType) -> pb.RenderInvoiceResponse:
        """An invoice as a document, with a name for its file. A closed invoice gives the same bytes each time."""
        request = pb.RenderInvoiceRequest(name=name, format=kind)
        answer = await self._transport.unary(self._stub.RenderInvoice, request, safe=True, timeout_s=RENDER_TIMEOUT_S)
        return cast(pb.RenderInvoiceResponse, answer)

    async def close(self, name: str) -> invoice_pb2.Invoice:
        """Closes the invoice of a month that is over; closed before, it is returned as it is."""
        request = pb.CloseInvoiceRequest(name=name)
        answer = await self._transport.unary(self._stub.CloseInvoice, request, safe=True)
        return cast(invoice_pb2.Invoice, answer.invoice)

    async def give_back(
        self,
        organization: str,
        nanos_usd: int,
        reason: str,
        *,
        resource: str = "",
        invoice: str = "",
        request_id: str | None = None,
    ) -> credit_note_pb2.CreditNote:
        """Gives money back by a credit note. The same request id gives the same note again."""
        request = pb.CreateCreditNoteRequest(
            organization=organization,
            amount_nanos_usd=nanos_usd,
            reason=reason,
            resource=resource,
            invoice=invoice,
            request_id=request_id or uuid.uuid4().hex,
        )
        answer = await self._transport.unary(self._stub.CreateCreditNote, request, safe=True)
        return cast(credit_note_pb2.CreditNote, answer.credit_note)

    def credit_notes(self, limit: int | None = None) -> AsyncIterator[credit_note_pb2.CreditNote]:
        """Credit notes, newest first."""
        return self._transport.pages(self._stub.ListCreditNotes, pb.ListCreditNotesRequest(), "credit_notes", limit)

    async def profile(self) -> invoice_pb2.BillingParty:
        """Name and address of the organization on open invoices; empty where none was set."""
        request = pb.GetBillingProfileRequest()
        answer = await self._transport.unary(self._stub.GetBillingProfile, request, safe=True)
        return cast(invoice_pb2.BillingParty, answer.profile)

    async def set_profile(self, profile: invoice_pb2.BillingParty) -> invoice_pb2.BillingParty:
        """Sets name and address for invoices that are not closed yet. Needs the admin role."""
        request = pb.UpdateBillingProfileRequest(profile=profile)
        answer = await self._transport.unary(self._stub.UpdateBillingProfile, request, safe=True)
        return cast(invoice_pb2.BillingParty, answer.profile)

    async def costs(
        self,
        start_day: str = "",
        end_day: str = "",
        *,
        group_by: Sequence[pb.CostDimension.ValueType] = (),
        project_id: str = "",
    ) -> pb.QueryCostsResponse:
        """What things cost from day to day; the running month without days."""
        request = pb.QueryCostsRequest(start_day=start_day, end_day=end_day, group_by=group_by, project_id=project_id)
        answer = await self._transport.unary(self._stub.QueryCosts, request, safe=True)
        return cast(pb.QueryCostsResponse, answer)

    async def export_usage(
        self,
        *,
        month: str = "",
        start: datetime | None = None,
        end: datetime | None = None,
        resource: str = "",
        kinds: Sequence[usage_record_pb2.UsageKind.ValueType] = (),
    ) -> AsyncIterator[usage_record_pb2.UsageRecord]:
        """The project's usage, oldest first: of the invoice of a month, or used from `start` and before `end`.

        Goes on where it was when the connection breaks.
        """
        request = pb.ExportUsageRequest(billing_month=month, resource=resource, kinds=kinds)
        if start is not None:
            request.start_time.FromDatetime(start)
        if end is not None:
            request.end_time.FromDatetime(end)
        failures = 0
        # Work keys of the last moment: a span begins anew at a moment, which several records can share.
        last, seen = Timestamp(), set[str]()
        while True:
            try:
                async for answer in self._transport.stream(self._stub.ExportUsage, request):
                    for record in answer.usage_records:
                        if record.usage_time != last:
                            last, seen = record.usage_time, set()
                        if record.work_key in seen:
                            continue
                        seen.add(record.work_key)
                        yield record
                        failures = 0
                return
            except Unavailable:
                failures += 1
                if failures >= self._transport.config.attempts:
                    raise
                if last.seconds:
                    request.start_time.CopyFrom(last)
