"""The parts of billing and of a metering service in one process, on one clock: as their `main.py` wires them, less
their doors. Not pure: database, bus, files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message

from bench.year.virtual_time import SteppedClock
from chassis.bus.connection import Bus, connect
from chassis.bus.consumer import Consumer, Handler
from chassis.bus.outbox import Outbox
from chassis.bus.relay import Relay
from chassis.clock import Clock
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool, transaction
from chassis.ids import SystemIds
from chassis.objects.object_store import PART_BYTES_MIN, ObjectStore
from chassis.retention import RetentionKeeper
from finemesh.events.v1 import billing_events_pb2, tuning_events_pb2
from services.billing.archive.archive_keeper import ArchiveKeeper
from services.billing.archive.archiver import Archiver
from services.billing.config import MIGRATIONS as BILLING_MIGRATIONS
from services.billing.config import BillingSettings
from services.billing.events import DURABLE, FAMILIES, Events
from services.billing.holds.expiry import OverdueWatch
from services.billing.invoices.closer import Closer
from services.billing.leasing.lease_collector import LeaseCollector
from services.billing.prices.catalogue import Catalogue, open_catalogue
from services.billing.retention_rules import retention_rules as billing_rules
from services.inference.config import MIGRATIONS as INFERENCE_MIGRATIONS
from services.inference.config import InferenceSettings
from services.inference.models.model_registry import Registry
from services.inference.retention_rules import retention_rules as inference_rules
from services.inference.spending.spend_guard import SpendGuard


@dataclass(frozen=True, kw_only=True)
class Billing:
    clock: SteppedClock
    settings: BillingSettings
    pool: Pool
    bus: Bus
    catalogue: Catalogue


@dataclass(frozen=True, kw_only=True)
class Meter:
    """Inference, as far as it meters and hears."""

    settings: InferenceSettings
    pool: Pool
    bus: Bus
    outbox: Outbox


@asynccontextmanager
async def open_billing(
    clock: SteppedClock, *, database_url: str, nats_url: str, folder: Path
) -> AsyncIterator[Billing]:
    settings = BillingSettings(database_url=database_url, nats_url=nats_url, artifacts_url=folder.as_uri())
    pool = await open_pool(settings)
    await migrate(pool, [BILLING_MIGRATIONS])
    async with transaction(pool) as connection:
        catalogue = await open_catalogue(connection, settings.price_books_dir, current=settings.price_book)
    bus = await connect(settings)
    outbox = Outbox(settings, clock=clock, ids=SystemIds(clock))
    objects = ObjectStore(settings.artifacts_url, part_bytes=PART_BYTES_MIN, parts_in_flight_max=1)
    handlers = Events(catalogue, settings.fact_limits, outbox, clock=clock).handlers
    parts = [
        Relay(pool, bus, outbox, clock=clock).run,
        Consumer(pool, bus, DURABLE, handlers, clock=clock, outbox=outbox, families=FAMILIES).run,
        Archiver(pool, bus, objects, settings, clock=clock).run,
        ArchiveKeeper(pool, objects, settings, clock=clock).run,
        LeaseCollector(pool, settings, clock=clock).run,
        OverdueWatch(pool, settings, clock=clock).run,
        Closer(pool, outbox, settings, clock=clock).run,
        RetentionKeeper(pool, billing_rules(settings), settings, clock=clock).run,
    ]
    async with _working(parts, bus, pool):
        yield Billing(clock=clock, settings=settings, pool=pool, bus=bus, catalogue=catalogue)


@asynccontextmanager
async def open_meter(clock: Clock, *, database_url: str, nats_url: str) -> AsyncIterator[Meter]:
    settings = InferenceSettings(database_url=database_url, nats_url=nats_url)
    pool = await open_pool(settings)
    await migrate(pool, [INFERENCE_MIGRATIONS])
    bus = await connect(settings)
    ids = SystemIds(clock)
    outbox = Outbox(settings, clock=clock, ids=ids)
    guard, registry = (
        SpendGuard(pool, poll_s=settings.spending_poll_s, clock=clock),
        Registry(outbox, warm_up=None, ids=ids),
    )
    handlers: dict[type[Message], Handler] = {
        tuning_events_pb2.TuningJobEnded: registry.job_ended,
        billing_events_pb2.CreditStateChanged: guard.credit_changed,
        billing_events_pb2.SpendCapStateChanged: guard.cap_changed,
    }
    parts = [
        Relay(pool, bus, outbox, clock=clock).run,
        Consumer(pool, bus, "inference", handlers, clock=clock, outbox=outbox).run,
        guard.run,
        RetentionKeeper(pool, inference_rules(settings), settings, clock=clock).run,
    ]
    async with _working(parts, bus, pool):
        yield Meter(settings=settings, pool=pool, bus=bus, outbox=outbox)


@asynccontextmanager
async def _working(parts: Sequence[Callable[[], Awaitable[None]]], bus: Bus, pool: Pool) -> AsyncIterator[None]:
    """A part that fails ends the year with its error."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_as_coroutine(part)) for part in parts]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await bus.close()
            await pool.close()


async def _as_coroutine(part: Callable[[], Awaitable[None]]) -> None:
    await part()
