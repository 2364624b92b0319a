"""HoldService, for the scheduler: quotes and the money held for them. Money is decided in `holds/` and `prices/`."""

from datetime import timedelta
from typing import Any

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
from services.billing.budgets.review import review_spending
from services.billing.config import BillingSettings
from services.billing.holds import holding
from services.billing.holds.store import HoldStore
from services.billing.ledger.store import LedgerStore
from services.billing.prices.catalogue import Catalogue
from services.billing.prices.pricebook import PriceBook, price_job


class HoldService(hold_service_pb2_grpc.HoldServiceServicer):
    def __init__(
        self, pool: Pool, catalogue: Catalogue, settings: BillingSettings, outbox: Outbox, *, clock: Clock
    ) -> None:
        self._pool = pool
        self._catalogue = catalogue
        self._limits = settings.limits
        self._renewals_max = settings.hold_renewals_max
        self._hold_ttl = timedelta(seconds=settings.hold_ttl_s)
        self._outbox = outbox
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
        now = self._clock.now()
        with typed_errors("price."):
            book = self._current_book(request.price.price_book_version)
            async with transaction(self._pool) as connection:
                hold = await holding.create_hold(
                    connection,
                    book,
                    resource=format_name(tuning_job_pb2.TuningJob, **parts),
                    organization_id=request.organization_id,
                    project_id=request.project_id,
                    work=work_from_proto(request.price),
                    now=now,
                    limits=self._limits,
                    ttl=self._hold_ttl,
                    api_key_id=request.api_key_id,
                )
                await review_spending(connection, self._outbox, [hold.organization_id], now, spenders=[hold.spender])
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
        if len(request.resources) > self._renewals_max:
            raise invalid("resources", f"must be at most {self._renewals_max} (hold_renewals_max)")
        for index, resource in enumerate(request.resources):
            parse_name(tuning_job_pb2.TuningJob, resource, f"resources[{index}]")
        until = self._clock.now() + self._hold_ttl
        async with transaction(self._pool) as connection:
            ended = await HoldStore(connection).renew(list(request.resources), until)
        return hold_service_pb2.RenewHoldsResponse(ended_resources=ended, expire_time=time_to_proto(until))

    def _current_book(self, version: str) -> PriceBook:
        """Only the current version holds money: nobody may choose a cheaper book for a job."""
        book = self._catalogue.at(self._clock.now())
        if version not in ("", book.version):
            raise invalid("price.price_book_version", f"must be empty or {book.version}, which prices new work")
        return book
