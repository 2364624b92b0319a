"""BillingService: prices, balance, usage and invoices of the caller's own organization and project."""

from typing import Any

from chassis import paging
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import NotFound, invalid
from chassis.identity import current_caller
from chassis.names import own_name, own_parent, parse_name
from chassis.timestamps import time_to_proto
from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.billing.v1 import billing_service_pb2_grpc
from finemesh.identity.v1 import identity_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.billing.api.convert import balance_to_proto, price_to_proto, usage_record_to_proto, work_from_proto
from services.billing.api.errors import typed_errors
from services.billing.api.organizations import Organizations
from services.billing.api.requests import (
    check_size,
    list_filter_from_proto,
    month_of,
    own_account,
    whole_account,
)
from services.billing.budgets.review import review_spending
from services.billing.budgets.store import BudgetStore
from services.billing.config import BillingSettings
from services.billing.holds.hold import HoldState
from services.billing.holds.store import HoldStore
from services.billing.invoices import invoicing
from services.billing.ledger.store import LedgerStore
from services.billing.ledger.top_up import add_credit
from services.billing.prices.catalogue import Catalogue
from services.billing.prices.pricebook import price_job
from services.billing.usage.store import UsageStore

TOP_UP_ROLE = "operator"


class BillingService(billing_service_pb2_grpc.BillingServiceServicer):
    def __init__(
        self,
        pool: Pool,
        catalogue: Catalogue,
        settings: BillingSettings,
        outbox: Outbox,
        organizations: Organizations,
        *,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._organizations = organizations
        self._pages = paging.Pages(settings.page_token_key)
        self._catalogue = catalogue
        self._settings = settings
        self._outbox = outbox
        self._clock = clock

    async def EstimatePrice(self, request: pb.EstimatePriceRequest, context: Any) -> pb.EstimatePriceResponse:
        if not request.base_model:
            raise invalid("base_model", "must name the base model")
        version = request.price_book_version
        with typed_errors():
            book = self._catalogue.version(version) if version else self._catalogue.at(self._clock.now())
            price = price_job(book, work_from_proto(request), self._settings.limits)
        return price_to_proto(price, book.version)

    async def GetBalance(self, request: pb.GetBalanceRequest, context: Any) -> pb.GetBalanceResponse:
        account = own_account(current_caller())
        async with self._pool.acquire() as connection:
            balances = await LedgerStore(connection).get_balances(account)
            low_balance = await BudgetStore(connection).get_low_balance(account)
        return pb.GetBalanceResponse(balance=balance_to_proto(account, balances, low_balance))

    async def TopUp(self, request: pb.TopUpRequest, context: Any) -> pb.TopUpResponse:
        caller = current_caller()
        caller.require_role(TOP_UP_ROLE)
        if request.organization:
            account = parse_name(identity_pb2.Organization, request.organization, "organization")["organization"]
        else:
            account = own_account(caller)
        self._check_top_up(request)
        await self._organizations.require(account, caller)
        now = self._clock.now()
        async with transaction(self._pool) as connection:
            transaction_id, balances = await add_credit(
                connection,
                organization_id=account,
                amount_nanos_usd=request.amount_nanos_usd,
                request_id=request.request_id,
                now=now,
                limits=self._settings.limits,
            )
            await review_spending(connection, self._outbox, [account], now)
            low_balance = await BudgetStore(connection).get_low_balance(account)
        self._outbox.wake()
        balance = balance_to_proto(account, balances, low_balance)
        return pb.TopUpResponse(balance=balance, transaction_id=str(transaction_id))

    async def ListUsageRecords(self, request: pb.ListUsageRecordsRequest, context: Any) -> pb.ListUsageRecordsResponse:
        project_id = own_parent(identity_pb2.Project, request.parent, current_caller())["project"]
        wanted = list_filter_from_proto(request, project_id)
        page = self._pages.read(
            request, scope=f"usage:{wanted!r}", kinds=paging.TIME_KINDS, maximum=self._settings.page_size_max
        )
        async with self._pool.acquire() as connection:
            found = await UsageStore(connection).list_newest(
                wanted,
                after=page.after_time(str),
                row_max=page.size,
                scan_max=self._settings.usage_scan_max,
            )
        token = page.token(paging.time_cursor(*found.next)) if found.next is not None else ""
        return pb.ListUsageRecordsResponse(
            usage_records=[usage_record_to_proto(record) for record in found.records], next_page_token=token
        )

    async def GetInvoice(self, request: pb.GetInvoiceRequest, context: Any) -> pb.GetInvoiceResponse:
        account = whole_account(current_caller())
        month = month_of(request.name, account, self._clock.now())
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            found = await invoicing.read(connection, self._settings.invoice_terms, account, month)
        check_size(found.ByteSize(), self._settings)
        return pb.GetInvoiceResponse(invoice=found)

    async def GetJobCharge(self, request: pb.GetJobChargeRequest, context: Any) -> pb.GetJobChargeResponse:
        own_name(tuning_job_pb2.TuningJob, request.tuning_job, current_caller(), "tuning_job")
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            hold = await HoldStore(connection).get(request.tuning_job)
            ending = await HoldStore(connection).get_ending(request.tuning_job)
            transaction_ids = await LedgerStore(connection).list_transaction_ids(request.tuning_job)
            totals = await HoldStore(connection).get_job_totals(request.tuning_job)
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
            accrued_nanos_usd=totals.amount_nanos_usd,
            training_tokens=totals.training_tokens,
            evaluation_tokens=totals.evaluation_tokens,
            discrepancy=hold.discrepancy,
            hold_expire_time=time_to_proto(hold.expire_time) if hold.state is HoldState.HELD else None,
        )

    def _check_top_up(self, request: pb.TopUpRequest) -> None:
        amount_max, chars_max = self._settings.amount_nanos_usd_max, self._settings.request_id_chars_max
        if not 1 <= request.amount_nanos_usd <= amount_max:
            raise invalid("amount_nanos_usd", f"must be from 1 to {amount_max}")
        if not 1 <= len(request.request_id) <= chars_max or not request.request_id.isprintable():
            raise invalid("request_id", f"must be 1 to {chars_max} printable characters")
