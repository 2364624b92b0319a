"""Starts billing: a straight line of wiring. It decides nothing and prices nothing."""

import functools
import sys
from collections.abc import Awaitable, Callable
from functools import partial

from chassis.bus.connection import Bus, connect
from chassis.bus.consumer import Consumer
from chassis.bus.durables import ARCHIVE_HEALTH
from chassis.bus.outbox import Outbox
from chassis.bus.relay import Relay
from chassis.clock import Clock, SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool, transaction
from chassis.ids import SystemIds
from chassis.objects.object_store import PART_BYTES_MIN, ObjectStore
from chassis.process import DrainStage, Process, run
from chassis.retention import RetentionKeeper
from chassis.rounds import spawn_keeper
from chassis.rpc.channel import open_channel
from chassis.rpc.server import ServerBuilder
from finemesh.billing.v1 import (
    billing_service_pb2_grpc,
    budget_service_pb2_grpc,
    invoice_service_pb2_grpc,
    ledger_service_pb2_grpc,
)
from finemesh.credit.v1 import credit_lease_service_pb2_grpc
from finemesh.holds.v1 import hold_service_pb2_grpc
from finemesh.organizations.v1.organization_service_pb2_grpc import OrganizationServiceStub
from services.billing.api.billing_service import BillingService
from services.billing.api.budget_service import BudgetService
from services.billing.api.credit_lease_service import CreditLeaseService
from services.billing.api.hold_service import HoldService
from services.billing.api.invoice_service import InvoiceService
from services.billing.api.ledger_service import LedgerService
from services.billing.api.organizations import Organizations
from services.billing.archive.archive_keeper import ArchiveKeeper
from services.billing.archive.archive_watch import ArchiveWatch
from services.billing.archive.archiver import Archiver
from services.billing.audit.archive_audit import ArchiveAudit
from services.billing.budgets.cap_refusals import CapRefusals
from services.billing.config import MIGRATIONS, BillingSettings
from services.billing.events import DURABLE, FAMILIES, Events
from services.billing.holds.expiry import Expiry, OverdueWatch
from services.billing.invoices.closer import Closer
from services.billing.leasing.lease_collector import LeaseCollector
from services.billing.leasing.recall import Recall
from services.billing.prices.catalogue import open_catalogue
from services.billing.retention_rules import retention_rules


async def main(process: Process, settings: BillingSettings) -> None:
    clock = SystemClock()
    pool = await open_pool(settings)
    process.on_drain(DrainStage.CLOSE_POOL, pool.close)
    await migrate(pool, [MIGRATIONS])
    async with transaction(pool) as connection:
        catalogue = await open_catalogue(connection, settings.price_books_dir, current=settings.price_book)

    bus = await connect(settings)
    process.on_drain(DrainStage.CLOSE_BUS, bus.close)
    outbox = Outbox(settings, clock=clock, ids=SystemIds(clock))
    events = Events(catalogue, settings.fact_limits, outbox, clock=clock)
    consumer = Consumer(pool, bus, DURABLE, events.handlers, clock=clock, outbox=outbox, families=FAMILIES)
    process.on_drain(DrainStage.STOP_CONSUMING, consumer.stop)
    process.spawn("consumer", consumer.run)
    process.spawn("relay", Relay(pool, bus, outbox, clock=clock).run, until=DrainStage.RELEASE_LEASES)

    keep = functools.partial(spawn_keeper, process, clock)
    collector = LeaseCollector(pool, settings, clock=clock)
    await collector.begin()
    keep("lease_collector", collector.run)
    recall = Recall(pool, settings, clock=clock)
    refusals = CapRefusals(pool, outbox, clock=clock)

    expiry = Expiry(pool, catalogue, outbox, consumer=DURABLE, clock=clock)
    keep("overdue_watch", OverdueWatch(pool, settings, clock=clock).run)
    keep("retention_keeper", RetentionKeeper(pool, retention_rules(settings), settings, clock=clock).run)
    keep("closer", Closer(pool, outbox, settings, clock=clock).run)

    organizations = ask_gateway(process, settings)
    server = ServerBuilder(process, settings, trusted_forwarders={"gateway"})
    bus.report_to(server.component)
    archive_audit = keep_archive(process, pool, bus, settings, clock, server.component(ARCHIVE_HEALTH))
    server.add(
        billing_service_pb2_grpc.add_BillingServiceServicer_to_server,
        BillingService(pool, catalogue, settings, outbox, organizations, clock=clock),
        "finemesh.billing.v1.BillingService",
        allow={"gateway"},
    )
    server.add(
        budget_service_pb2_grpc.add_BudgetServiceServicer_to_server,
        BudgetService(pool, settings, outbox, clock=clock),
        "finemesh.billing.v1.BudgetService",
        allow={"gateway"},
    )
    server.add(
        hold_service_pb2_grpc.add_HoldServiceServicer_to_server,
        HoldService(pool, catalogue, settings, outbox, expiry, consumer, recall, refusals, clock=clock),
        "finemesh.holds.v1.HoldService",
        allow={"scheduler"},
    )
    server.add(
        credit_lease_service_pb2_grpc.add_CreditLeaseServiceServicer_to_server,
        CreditLeaseService(pool, catalogue, settings, recall, refusals, clock=clock),
        "finemesh.credit.v1.CreditLeaseService",
        allow={"inference"},
    )
    server.add(
        ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server,
        LedgerService(pool, consumer, outbox, archive_audit, settings, clock=clock),
        "finemesh.billing.v1.LedgerService",
        allow={"gateway"},
    )
    server.add(
        invoice_service_pb2_grpc.add_InvoiceServiceServicer_to_server,
        InvoiceService(pool, settings, outbox, organizations, clock=clock),
        "finemesh.billing.v1.InvoiceService",
        allow={"gateway"},
    )
    await server.start()


def ask_gateway(process: Process, settings: BillingSettings) -> Organizations:
    """A channel connects at its first call, so start order does not matter."""
    gateway = open_channel(settings, settings.gateway_address, "gateway")
    process.on_drain(DrainStage.RELEASE_LEASES, gateway.close)
    return Organizations(OrganizationServiceStub(gateway))


def keep_archive(
    process: Process,
    pool: Pool,
    bus: Bus,
    settings: BillingSettings,
    clock: Clock,
    tell: Callable[[bool], Awaitable[None]],
) -> Callable[[str | None], ArchiveAudit]:
    """Starts what writes the archive, deletes from it, and tells when it is late; the answer compares it with an
    organization's ledger."""
    objects = ObjectStore(settings.artifacts_url, part_bytes=PART_BYTES_MIN, parts_in_flight_max=1)
    archiver = Archiver(pool, bus, objects, settings, clock=clock)
    process.on_drain(DrainStage.STOP_CONSUMING, archiver.stop)
    process.spawn("archiver", archiver.run)
    process.spawn("archive_keeper", ArchiveKeeper(pool, objects, settings, clock=clock).run)
    spawn_keeper(process, clock, "archive_watch", ArchiveWatch(bus, settings, tell, clock=clock).run)
    return partial(ArchiveAudit, pool, bus, objects, settings, consumer=DURABLE)


def start() -> int:
    settings = BillingSettings()
    return run(lambda process: main(process, settings), settings)


if __name__ == "__main__":
    sys.exit(start())
