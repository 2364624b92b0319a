"""HoldService, for the scheduler: quotes and the money held for them. Money is decided in `holds/` and `prices/`."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from chassis import paging
from chassis.bus.consumer import Consumer
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import invalid
from chassis.names import format_name, parse_name
from chassis.timestamps import time_to_proto
from finemesh.holds.v1 import hold_service_pb2, hold_service_pb2_grpc
from finemesh.identity.v1 import identity_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.billing.api.convert import price_to_proto, work_from_proto
from services.billing.api.errors import typed_errors
from services.billing.budgets.cap_refusals import CapRefusals
from services.billing.budgets.caps import Spender
from services.billing.budgets.review import review_spending
from services.billing.config import BillingSettings
from services.billing.holds import holding
from services.billing.holds.expiry import Expiry, Word
from services.billing.holds.hold import Hold
from services.billing.holds.store import HoldStore
from services.billing.leasing.recall import Recall
from services.billing.ledger.store import LedgerStore
from services.billing.prices.catalogue import Catalogue
from services.billing.prices.pricebook import PriceBook, price_job


class HoldService(hold_service_pb2_grpc.HoldServiceServicer):
    def __init__(
        self,
        pool: Pool,
        catalogue: Catalogue,
        settings: BillingSettings,
        outbox: Outbox,
        expiry: Expiry,
        consumer: Consumer,
        recall: Recall,
        cap_refusals: CapRefusals,
        *,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._pages = paging.Pages(settings.page_token_key)
        self._catalogue = catalogue
        self._limits = settings.limits
        self._renewals_max = settings.hold_renewals_max
        self._hold_ttl = timedelta(seconds=settings.hold_ttl_s)
        self._outbox = outbox
        self._expiry = expiry
        self._consumer = consumer
        self._recall = recall
        self._cap_refusals = cap_refusals
        self._late_usage = settings.credit_late_usage
        self._clock = clock

    async def QuoteWork(
        self, request: hold_service_pb2.QuoteWorkRequest, context: Any
    ) -> hold_service_pb2.QuoteWorkResponse:
        parse_name(identity_pb2.Organization, f"organizations/{request.organization_id}", "organization_id")
        with typed_errors("price."):
            book = self._current_book(request.price.price_book_version)
            price = price_job(book, work_from_proto(request.price), self._limits)
        async with self._pool.acquire() as connection:
            balances = await LedgerStore(connection).get_balances(request.organization_id)
        return hold_service_pb2.QuoteWorkResponse(
            quote=price_to_proto(price, book.version), available_nanos_usd=balances.available_nanos_usd
        )

    async def CreateHold(
        self, request: hold_service_pb2.CreateHoldRequest, context: Any
    ) -> hold_service_pb2.CreateHoldResponse:
        parts = parse_name(tuning_job_pb2.TuningJob, request.resource, "resource")
        if parts["project"] != request.project_id:
            raise invalid("project_id", "is not the project of the resource")
        parse_name(identity_pb2.Organization, f"organizations/{request.organization_id}", "organization_id")
        with typed_errors("price."):
            book = self._current_book(request.price.price_book_version)
            whose = Spender(request.project_id, request.api_key_id)
            async with self._cap_refusals.telling(request.organization_id, whose):
                hold = await self._recall.retrying(
                    lambda: self._hold(request, format_name(tuning_job_pb2.TuningJob, **parts), book),
                    organization_id=request.organization_id,
                )
        self._outbox.wake()
        made_by = self._catalogue.version(hold.price_book_version)
        return hold_service_pb2.CreateHoldResponse(
            hold_id=hold.id,
            quote=price_to_proto(holding.quote_of(hold, made_by), made_by.version),
            expire_time=time_to_proto(hold.expire_time),
        )

    async def ReleaseHold(
        self, request: hold_service_pb2.ReleaseHoldRequest, context: Any
    ) -> hold_service_pb2.ReleaseHoldResponse:
        parse_name(tuning_job_pb2.TuningJob, request.resource, "resource")
        now = self._clock.now()
        async with transaction(self._pool) as connection:
            released = await holding.release_hold(connection, resource=request.resource, now=now)
            if released is not None:
                whose = [released.spender]
                await review_spending(connection, self._outbox, [released.organization_id], now, spenders=whose)
        self._outbox.wake()
        return hold_service_pb2.ReleaseHoldResponse(released_nanos_usd=released.held_nanos_usd if released else 0)

    async def RenewHolds(
        self, request: hold_service_pb2.RenewHoldsRequest, context: Any
    ) -> hold_service_pb2.RenewHoldsResponse:
        self._check(resources=request.resources)
        async with transaction(self._pool) as connection:
            holds = HoldStore(connection)
            ended = await holds.renew(list(request.resources), self._hold_ttl)
            until = await holds.get_expire_time(self._hold_ttl)
        return hold_service_pb2.RenewHoldsResponse(ended_resources=ended, expire_time=time_to_proto(until))

    async def ListOverdueHolds(
        self, request: hold_service_pb2.ListOverdueHoldsRequest, context: Any
    ) -> hold_service_pb2.ListOverdueHoldsResponse:
        page = self._pages.read(request, scope="overdue holds", kinds=(str,), maximum=self._renewals_max)
        async with self._pool.acquire() as connection:
            found = await HoldStore(connection).list_expired(after=page.after(""), row_max=page.row_max)
        resources, next_page_token = page.cut(found, lambda resource: (resource,))
        return hold_service_pb2.ListOverdueHoldsResponse(resources=resources, next_page_token=next_page_token)

    async def EndHolds(
        self, request: hold_service_pb2.EndHoldsRequest, context: Any
    ) -> hold_service_pb2.EndHoldsResponse:
        self._check(ended_resources=request.ended_resources, unknown_resources=request.unknown_resources)
        words = {resource: Word.UNKNOWN for resource in request.unknown_resources}
        words |= {resource: Word.ENDED for resource in request.ended_resources}
        # Asked after the scheduler gave its word: what it published before is then either handled or still counted.
        if not await self._consumer.is_drained():
            return hold_service_pb2.EndHoldsResponse(open_resources=sorted(words))
        return hold_service_pb2.EndHoldsResponse(open_resources=await self._expiry.end(words))

    async def _hold(self, request: hold_service_pb2.CreateHoldRequest, resource: str, book: PriceBook) -> Hold:
        now = self._clock.now()
        async with transaction(self._pool) as connection:
            hold = await holding.create_hold(
                connection,
                book,
                resource=resource,
                organization_id=request.organization_id,
                project_id=request.project_id,
                work=work_from_proto(request.price),
                now=now,
                limits=self._limits,
                ttl=self._hold_ttl,
                late_usage=self._late_usage,
                api_key_id=request.api_key_id,
            )
            await review_spending(connection, self._outbox, [hold.organization_id], now, spenders=[hold.spender])
        return hold

    def _check(self, **fields: Sequence[str]) -> None:
        if sum(map(len, fields.values())) > self._renewals_max:
            raise invalid(next(iter(fields)), f"must be at most {self._renewals_max} (hold_renewals_max)")
        for field, resources in fields.items():
            for index, resource in enumerate(resources):
                parse_name(tuning_job_pb2.TuningJob, resource, f"{field}[{index}]")

    def _current_book(self, version: str) -> PriceBook:
        """Only the current version holds money: nobody may choose a cheaper book for a job."""
        book = self._catalogue.at(self._clock.now())
        if version not in ("", book.version):
            raise invalid("price.price_book_version", f"must be empty or {book.version}, which prices new work")
        return book
