"""BillingService: prices, balance, usage and invoices of the caller's own organization and project, and nobody else's."""

import uuid
from datetime import UTC, datetime
from typing import Any

from chassis import paging
from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import FieldViolation, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted
from chassis.identity import Caller, current_caller
from chassis.names import own_name, own_parent, parse_name
from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.billing.v1 import billing_service_pb2_grpc, money_pb2
from finemesh.identity.v1 import identity_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.billing import convert, holding, invoice, store
from services.billing.config import BillingSettings
from services.billing.ledger import HoldState
from services.billing.pricebook import Shelf, price_job
from services.billing.refusal import refusing

TOP_UP_ROLE = "operator"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class BillingService(billing_service_pb2_grpc.BillingServiceServicer):
    def __init__(self, pool: Pool, shelf: Shelf, settings: BillingSettings, *, clock: Clock) -> None:
        self._pool = pool
        self._shelf = shelf
        self._settings = settings
        self._clock = clock

    async def EstimatePrice(self, request: pb.EstimatePriceRequest, context: Any) -> pb.EstimatePriceResponse:
        if not request.base_model:
            raise _invalid("base_model", "must name the base model")
        version = request.price_book_version
        with refusing():
            book = self._shelf.version(version) if version else self._shelf.at(self._clock.now())
            price = price_job(book, convert.work_of(request), self._settings.limits)
        return convert.to_price(price, book.version)

    async def GetBalance(self, request: pb.GetBalanceRequest, context: Any) -> pb.GetBalanceResponse:
        account = _account(current_caller())
        async with self._pool.acquire() as connection:
            balances = await store.get_balances(connection, account)
        return pb.GetBalanceResponse(balance=convert.to_balance(account, balances))

    async def TopUp(self, request: pb.TopUpRequest, context: Any) -> pb.TopUpResponse:
        caller = current_caller()
        caller.require_role(TOP_UP_ROLE)
        if request.organization:
            account = parse_name(identity_pb2.Organization, request.organization, "organization")["organization"]
        else:
            account = _account(caller)
        self._check_top_up(request)
        async with transaction(self._pool) as connection:
            transaction_id, balances = await holding.top_up(
                connection,
                organization_id=account,
                amount_nanos_usd=request.amount_nanos_usd,
                request_id=request.request_id,
                now=self._clock.now(),
                limits=self._settings.limits,
            )
        return pb.TopUpResponse(balance=convert.to_balance(account, balances), transaction_id=str(transaction_id))

    async def ListUsageRecords(self, request: pb.ListUsageRecordsRequest, context: Any) -> pb.ListUsageRecordsResponse:
        project_id = own_parent(identity_pb2.Project, request.parent, current_caller())["project"]
        size = paging.page_size(request.page_size, maximum=self._settings.page_size_max)
        scope = f"usage:{project_id}:{request.resource}"
        before = _position(paging.decode_token(request.page_token, scope=scope, kinds=(int, str)))
        async with self._pool.acquire() as connection:
            records = await store.list_usage(
                connection, project_id, resource=request.resource, before=before, row_max=size + 1
            )
        page = records[:size]
        token = ""
        if len(records) > size:
            cursor = ((page[-1].usage_time - _EPOCH) // datetime.resolution, str(page[-1].id))
            token = paging.encode_token(cursor, scope=scope)
        return pb.ListUsageRecordsResponse(
            usage_records=[convert.to_usage_record(record) for record in page], next_page_token=token
        )

    async def GetInvoice(self, request: pb.GetInvoiceRequest, context: Any) -> pb.GetInvoiceResponse:
        account = _account(current_caller())
        now = self._clock.now()
        month = _month(request.name, account, now)
        lines_max, names_max = self._settings.invoice_lines_max, self._settings.invoice_names_max
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            charges = await store.list_charges(
                connection,
                account,
                month,
                name_max=self._settings.invoice_names_per_line_max,
                row_max=lines_max + 1,
            )
        if len(charges) > lines_max:
            raise ResourceExhausted(
                "SIZE_LIMIT", f"the invoice has more than {lines_max} lines", metadata={"limit": "invoice_lines_max"}
            )
        built = invoice.build(organization_id=account, month=month, charges=charges, now=now)
        return pb.GetInvoiceResponse(
            invoice=convert.to_invoice(built, names_per_line_max=names_max // max(1, len(charges)))
        )

    async def GetJobCharge(self, request: pb.GetJobChargeRequest, context: Any) -> pb.GetJobChargeResponse:
        own_name(tuning_job_pb2.TuningJob, request.tuning_job, current_caller(), "tuning_job")
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            hold = await store.get_hold(connection, request.tuning_job)
            ending = await store.get_job_ending(connection, request.tuning_job)
            transaction_ids = await store.list_transaction_ids(connection, request.tuning_job)
        if hold is None and ending is None:
            raise NotFound("NOT_FOUND", f"no job {request.tuning_job} was ever quoted")
        if hold is None:
            # It ended before it was quoted: nothing was held and nothing is owed.
            return pb.GetJobChargeResponse(settled=True)
        return pb.GetJobChargeResponse(
            quoted_nanos_usd=hold.held_nanos_usd,
            held_nanos_usd=hold.held_nanos_usd,
            charged_nanos_usd=hold.charged_nanos_usd,
            released_nanos_usd=hold.released_nanos_usd,
            settled=hold.state is not HoldState.HELD,
            price_book_version=hold.price_book_version,
            transaction_ids=[str(transaction_id) for transaction_id in transaction_ids],
        )

    def _check_top_up(self, request: pb.TopUpRequest) -> None:
        amount_max, chars_max = self._settings.amount_nanos_usd_max, self._settings.request_id_chars_max
        if not 1 <= request.amount_nanos_usd <= amount_max:
            raise _invalid("amount_nanos_usd", f"must be from 1 to {amount_max}")
        if not 1 <= len(request.request_id) <= chars_max or not request.request_id.isprintable():
            raise _invalid("request_id", f"must be 1 to {chars_max} printable characters")


def _account(caller: Caller) -> str:
    if not caller.account:
        raise PermissionDenied("CALLER_NOT_ALLOWED", "this call must be made for an organization")
    return caller.account


def _month(name: str, account: str, now: datetime) -> invoice.Month:
    """The month of one of the caller's own invoices that can exist by now."""
    running = invoice.Month.of(now)
    if not name:
        return running
    parts = parse_name(money_pb2.Invoice, name)
    month = invoice.Month.parse(parts["invoice"])
    if month is None:
        raise _invalid("name", "must end in a month such as 2026-11")
    if parts["organization"] != account or month.start > running.start:
        raise NotFound("NOT_FOUND", f"name names nothing that exists: {name}", metadata={"name": name})
    return month


def _position(cursor: paging.Cursor | None) -> tuple[datetime, uuid.UUID] | None:
    if cursor is None:
        return None
    try:
        return _EPOCH + int(cursor[0]) * datetime.resolution, uuid.UUID(str(cursor[1]))
    except (ValueError, OverflowError):
        raise _invalid("page_token", "is not a token of this list; begin again without one") from None


def _invalid(field: str, problem: str) -> InvalidArgument:
    return InvalidArgument("INVALID_FIELD", f"{field} {problem}", violations=[FieldViolation(field, problem)])
