"""InvoiceService: invoices as documents, corrections and reports of cost, of the caller's own organization and project.

What shows all projects of the organization needs an admin: the table is in docs/ledger.md. Only an operator closes
invoices and gives money back, for any organization. Money is decided in `invoices/`.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from chassis import paging
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import ResourceExhausted
from chassis.identity import current_caller
from chassis.names import NAME_CHARS_MAX, own_parent
from finemesh.billing.v1 import invoice_service_pb2 as pb
from finemesh.billing.v1 import invoice_service_pb2_grpc
from finemesh.identity.v1 import identity_pb2
from services.billing.api import requests
from services.billing.api.convert import costs_to_proto, dimensions_from_proto, usage_record_to_proto
from services.billing.api.organizations import Organizations
from services.billing.calendar import Month
from services.billing.config import BillingSettings
from services.billing.invoices import crediting, invoicing
from services.billing.invoices.convert import (
    closed_head_to_proto,
    closed_invoice_to_proto,
    credit_note_to_proto,
    party_to_proto,
)
from services.billing.invoices.documents.formats import Document, render
from services.billing.invoices.store import InvoiceStore
from services.billing.usage.store import UsageStore
from services.billing.usage.usage_pages import Position

OPERATOR = "operator"


class InvoiceService(invoice_service_pb2_grpc.InvoiceServiceServicer):
    def __init__(
        self, pool: Pool, settings: BillingSettings, outbox: Outbox, organizations: Organizations, *, clock: Clock
    ) -> None:
        self._pool = pool
        self._organizations = organizations
        self._pages = paging.Pages(settings.page_token_key)
        self._settings = settings
        self._outbox = outbox
        self._clock = clock
        # Documents are drawn one at a time, beside the loop: they take a millisecond a line, and a call that its caller
        # gave up must not leave a second one running.
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="documents")

    async def ListInvoices(self, request: pb.ListInvoicesRequest, context: Any) -> pb.ListInvoicesResponse:
        account = requests.whole_account(current_caller())
        page = self._pages.read(
            request, scope=f"invoices:{account}", kinds=(str,), maximum=self._settings.page_size_max
        )
        before = requests.month_before(page.cursor)
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            heads = await invoicing.list_heads(
                connection, account, before=before, running=Month.of(self._clock.now()), row_max=page.row_max
            )
        shown, token = page.cut(heads, lambda head: (head.name.rpartition("/")[2],))
        return pb.ListInvoicesResponse(invoices=shown, next_page_token=token)

    async def RenderInvoice(self, request: pb.RenderInvoiceRequest, context: Any) -> pb.RenderInvoiceResponse:
        account = requests.whole_account(current_caller())
        requests.check_choice("format", request.format, pb.InvoiceFormat.values())
        month = requests.month_of(request.name, account, self._clock.now())
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            found = await invoicing.read(connection, self._settings.invoice_terms, account, month)
        loop = asyncio.get_running_loop()
        document: Document = await loop.run_in_executor(self._drawing, render, found, request.format)
        requests.check_size(len(document.content), self._settings)
        return pb.RenderInvoiceResponse(
            content=document.content, content_type=document.content_type, filename=document.filename
        )

    async def CloseInvoice(self, request: pb.CloseInvoiceRequest, context: Any) -> pb.CloseInvoiceResponse:
        caller = current_caller()
        caller.require_role(OPERATOR)
        organization_id, month = requests.invoice_of(request.name)
        await self._organizations.require(organization_id, caller)
        terms, now = self._settings.invoice_terms, self._clock.now()
        closed = await invoicing.close_at_once(
            self._pool, self._outbox, terms, organization_id=organization_id, month=month, now=now
        )
        # It is closed now, so what does not fit into a message is answered without its lines and not refused.
        fits = len(closed.content) <= requests.size_bytes_max(self._settings)
        answer = closed_invoice_to_proto(closed) if fits else closed_head_to_proto(organization_id, closed)
        return pb.CloseInvoiceResponse(invoice=answer)

    async def CreateCreditNote(self, request: pb.CreateCreditNoteRequest, context: Any) -> pb.CreateCreditNoteResponse:
        caller = current_caller()
        caller.require_role(OPERATOR)
        correction = requests.correction_from_proto(request, self._settings)
        await self._organizations.require(correction.organization_id, caller)
        async with transaction(self._pool) as connection:
            note = await crediting.give_back(
                connection, self._outbox, correction, now=self._clock.now(), limits=self._settings.limits
            )
        self._outbox.wake()
        return pb.CreateCreditNoteResponse(credit_note=credit_note_to_proto(note))

    async def ListCreditNotes(self, request: pb.ListCreditNotesRequest, context: Any) -> pb.ListCreditNotesResponse:
        account = requests.whole_account(current_caller())
        page = self._pages.read(
            request, scope=f"creditNotes:{account}", kinds=(int,), maximum=self._settings.page_size_max
        )
        async with self._pool.acquire() as connection:
            notes = await InvoiceStore(connection).list_credit_notes(
                account, before=int(page.cursor[0]) if page.cursor else None, row_max=page.row_max
            )
        shown, token = page.cut(notes, lambda note: (note.number,))
        return pb.ListCreditNotesResponse(
            credit_notes=[credit_note_to_proto(note) for note in shown], next_page_token=token
        )

    async def GetBillingProfile(
        self, request: pb.GetBillingProfileRequest, context: Any
    ) -> pb.GetBillingProfileResponse:
        account = requests.whole_account(current_caller())
        async with self._pool.acquire() as connection:
            profile = await InvoiceStore(connection).get_profile(account)
        return pb.GetBillingProfileResponse(profile=party_to_proto(profile))

    async def UpdateBillingProfile(
        self, request: pb.UpdateBillingProfileRequest, context: Any
    ) -> pb.UpdateBillingProfileResponse:
        account = requests.whole_account(current_caller())
        profile = requests.profile_from_proto(request.profile, self._settings)
        async with self._pool.acquire() as connection:
            await InvoiceStore(connection).save_profile(account, profile, self._clock.now())
        return pb.UpdateBillingProfileResponse(profile=party_to_proto(profile))

    async def QueryCosts(self, request: pb.QueryCostsRequest, context: Any) -> pb.QueryCostsResponse:
        caller = current_caller()
        account = requests.own_account(caller)
        rows_max = self._settings.cost_rows_max
        start_day, end_day = requests.days_of(
            request.start_day, request.end_day, self._clock.now(), self._settings.cost_days_max
        )
        dimensions = dimensions_from_proto(request.group_by)
        requests.check_text("project_id", request.project_id, NAME_CHARS_MAX)
        project_id = requests.costs_project(request.project_id, caller)
        async with self._pool.acquire() as connection:
            rows = await UsageStore(connection).list_costs(
                account,
                project_id=project_id,
                start_day=start_day,
                end_day=end_day,
                dimensions=dimensions,
                row_max=rows_max + 1,
            )
        if len(rows) > rows_max:
            raise _too_many_rows(rows_max)
        answer = costs_to_proto(rows)
        requests.check_size(answer.ByteSize(), self._settings)
        return answer

    async def ExportUsage(self, request: pb.ExportUsageRequest, context: Any) -> AsyncIterator[pb.ExportUsageResponse]:
        """A connection is held for each batch and not for the export: a slow reader costs nobody anything."""
        project_id = own_parent(identity_pb2.Project, request.parent, current_caller())["project"]
        wanted = requests.export_filter_from_proto(request, project_id)
        if wanted.billing_month is not None:
            account = requests.own_account(current_caller())
            async with self._pool.acquire() as connection:
                wanted = await UsageStore(connection).within_month(wanted, account)
        position: Position | None = None
        while True:
            async with self._pool.acquire() as connection:
                page = await UsageStore(connection).list_oldest(
                    wanted, after=position, scan_max=self._settings.export_batch_max
                )
            if page.records:
                yield pb.ExportUsageResponse(usage_records=[usage_record_to_proto(record) for record in page.records])
            if page.next is None:
                return
            position = page.next


def _too_many_rows(rows_max: int) -> ResourceExhausted:
    return ResourceExhausted(
        "SIZE_LIMIT",
        f"the report has more than {rows_max} rows: take fewer days or sum by less",
        metadata={"limit": "cost_rows_max", "limit_rows": str(rows_max)},
    )
