"""InvoiceService: invoices as documents, corrections and reports of cost, of the caller's own organization and project.

Only an operator closes invoices and gives money back, for any organization. Money is decided in `invoicing.py` and
`crediting.py`.
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
from services.billing import convert, convert_documents, cost_store, crediting, document_store, invoicing, usage_pages
from services.billing import document_requests as requests
from services.billing.config import BillingSettings
from services.billing.documents.formats import Document, render
from services.billing.invoice import Month

OPERATOR, ADMIN = "operator", "admin"


class InvoiceService(invoice_service_pb2_grpc.InvoiceServiceServicer):
    def __init__(self, pool: Pool, settings: BillingSettings, outbox: Outbox, *, clock: Clock) -> None:
        self._pool = pool
        self._settings = settings
        self._outbox = outbox
        self._clock = clock
        # Documents are drawn one at a time, beside the loop: they take a millisecond a line, and a call that its caller
        # gave up must not leave a second one running.
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="documents")

    async def ListInvoices(self, request: pb.ListInvoicesRequest, context: Any) -> pb.ListInvoicesResponse:
        account = requests.own_account(current_caller())
        size = paging.page_size(request.page_size, maximum=self._settings.page_size_max)
        scope = f"invoices:{account}"
        before = requests.month_before(paging.decode_token(request.page_token, scope=scope, kinds=(str,)))
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            heads = await invoicing.list_heads(
                connection, account, before=before, running=Month.of(self._clock.now()), row_max=size + 1
            )
        page = heads[:size]
        more = len(heads) > size
        token = paging.encode_token((page[-1].name.rpartition("/")[2],), scope=scope) if more else ""
        return pb.ListInvoicesResponse(invoices=page, next_page_token=token)

    async def RenderInvoice(self, request: pb.RenderInvoiceRequest, context: Any) -> pb.RenderInvoiceResponse:
        account = requests.own_account(current_caller())
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
        current_caller().require_role(OPERATOR)
        organization_id, month = requests.invoice_of(request.name)
        async with transaction(self._pool) as connection:
            closed = await invoicing.close(
                connection,
                self._outbox,
                self._settings.invoice_terms,
                organization_id=organization_id,
                month=month,
                now=self._clock.now(),
            )
        self._outbox.wake()
        # It is closed now, so what does not fit into a message is answered without its lines and not refused.
        fits = len(closed.content) <= requests.size_bytes_max(self._settings)
        answer = (
            convert_documents.to_closed_invoice(closed) if fits else convert_documents.to_head(organization_id, closed)
        )
        return pb.CloseInvoiceResponse(invoice=answer)

    async def CreateCreditNote(self, request: pb.CreateCreditNoteRequest, context: Any) -> pb.CreateCreditNoteResponse:
        current_caller().require_role(OPERATOR)
        correction = requests.correction_of(request, self._settings)
        async with transaction(self._pool) as connection:
            note = await crediting.give_back(
                connection, self._outbox, correction, now=self._clock.now(), limits=self._settings.limits
            )
        self._outbox.wake()
        return pb.CreateCreditNoteResponse(credit_note=convert_documents.to_credit_note(note))

    async def ListCreditNotes(self, request: pb.ListCreditNotesRequest, context: Any) -> pb.ListCreditNotesResponse:
        account = requests.own_account(current_caller())
        size = paging.page_size(request.page_size, maximum=self._settings.page_size_max)
        scope = f"creditNotes:{account}"
        cursor = paging.decode_token(request.page_token, scope=scope, kinds=(int,))
        async with self._pool.acquire() as connection:
            notes = await document_store.list_credit_notes(
                connection, account, before=int(cursor[0]) if cursor else None, row_max=size + 1
            )
        page = notes[:size]
        token = paging.encode_token((page[-1].number,), scope=scope) if len(notes) > size else ""
        return pb.ListCreditNotesResponse(
            credit_notes=[convert_documents.to_credit_note(note) for note in page], next_page_token=token
        )

    async def GetBillingProfile(
        self, request: pb.GetBillingProfileRequest, context: Any
    ) -> pb.GetBillingProfileResponse:
        account = requests.own_account(current_caller())
        async with self._pool.acquire() as connection:
            profile = await document_store.get_profile(connection, account)
        return pb.GetBillingProfileResponse(profile=convert_documents.to_party(profile))

    async def UpdateBillingProfile(
        self, request: pb.UpdateBillingProfileRequest, context: Any
    ) -> pb.UpdateBillingProfileResponse:
        caller = current_caller()
        account = requests.own_account(caller)
        caller.require_role(ADMIN)
        profile = requests.profile_of(request.profile, self._settings)
        async with self._pool.acquire() as connection:
            await document_store.save_profile(connection, account, profile, self._clock.now())
        return pb.UpdateBillingProfileResponse(profile=convert_documents.to_party(profile))

    async def QueryCosts(self, request: pb.QueryCostsRequest, context: Any) -> pb.QueryCostsResponse:
        account = requests.own_account(current_caller())
        rows_max = self._settings.cost_rows_max
        start_day, end_day = requests.days_of(
            request.start_day, request.end_day, self._clock.now(), self._settings.cost_days_max
        )
        dimensions = convert_documents.dimensions_of(request.group_by)
        requests.check_text("project_id", request.project_id, NAME_CHARS_MAX)
        async with self._pool.acquire() as connection:
            rows = await cost_store.list_costs(
                connection,
                account,
                project_id=request.project_id,
                start_day=start_day,
                end_day=end_day,
                dimensions=dimensions,
                row_max=rows_max + 1,
            )
        if len(rows) > rows_max:
            raise _too_many_rows(rows_max)
        answer = convert_documents.to_costs(rows)
        requests.check_size(answer.ByteSize(), self._settings)
        return answer

    async def ExportUsage(self, request: pb.ExportUsageRequest, context: Any) -> AsyncIterator[pb.ExportUsageResponse]:
        """A connection is held for each batch and not for the export: a slow reader costs nobody anything."""
        project_id = own_parent(identity_pb2.Project, request.parent, current_caller())["project"]
        wanted = requests.export_of(request, project_id)
        if wanted.billing_month is not None:
            account = requests.own_account(current_caller())
            async with self._pool.acquire() as connection:
                wanted = await usage_pages.within_month(connection, wanted, account)
        position: usage_pages.Position | None = None
        while True:
            async with self._pool.acquire() as connection:
                page = await usage_pages.oldest(
                    connection, wanted, after=position, scan_max=self._settings.export_batch_max
                )
            if page.records:
                yield pb.ExportUsageResponse(usage_records=[convert.to_usage_record(record) for record in page.records])
            if page.next is None:
                return
            position = page.next


def _too_many_rows(rows_max: int) -> ResourceExhausted:
    return ResourceExhausted(
        "SIZE_LIMIT",
        f"the report has more than {rows_max} rows: take fewer days or sum by less",
        metadata={"limit": "cost_rows_max", "limit_rows": str(rows_max)},
    )
