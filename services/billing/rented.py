"""Machines by the clock become money: started minutes of an endpoint's devices, started hours of a cluster's nodes.

It runs in the consumer's transaction, so an event and its effect are one; it knows no message format. Nothing is refused
for lack of credit: what ran is owed.
"""

from datetime import datetime

from opentelemetry import metrics

from chassis.db.pool import Connection
from chassis.errors import InvalidArgument
from services.billing import ledger, store, usage_store
from services.billing.batch import UsageBatch
from services.billing.facts import ClusterFact, EndpointFact
from services.billing.ledger import TransactionKind
from services.billing.months import OpenMonths
from services.billing.pricebook import Shelf
from services.billing.records import UsageKind, UsageRecord

_booked = metrics.get_meter(__name__).create_counter("billing.usage_records", unit="{record}")


async def book_endpoint_minute(connection: Connection, shelf: Shelf, fact: EndpointFact, now: datetime) -> None:
    """Books one started minute of all devices of a replica."""
    book = shelf.at(fact.usage_time)
    await _book(
        connection,
        TransactionKind.ENDPOINT,
        UsageKind.ENDPOINT_MINUTES,
        fact,
        quantity=fact.device_count,
        unit_price_nanos_usd=book.hosting_rate(fact.hardware_type).nanos_usd_per_device_minute,
        price_book_version=book.version,
        now=now,
    )


async def book_cluster_hour(connection: Connection, shelf: Shelf, fact: ClusterFact, now: datetime) -> None:
    """Books one started hour of all nodes of a cluster."""
    book = shelf.at(fact.usage_time)
    await _book(
        connection,
        TransactionKind.CLUSTER,
        UsageKind.CLUSTER_HOURS,
        fact,
        quantity=fact.node_count,
        unit_price_nanos_usd=book.cluster_rate(fact.hardware_type).nanos_usd_per_node_hour,
        price_book_version=book.version,
        now=now,
    )


async def _book(
    connection: Connection,
    entry_kind: TransactionKind,
    usage_kind: UsageKind,
    fact: EndpointFact | ClusterFact,
    *,
    quantity: int,
    unit_price_nanos_usd: int,
    price_book_version: str,
    now: datetime,
) -> None:
    standings = await store.lock_organizations(connection, [fact.organization_id])
    months = await OpenMonths.read(connection, [fact.organization_id], [fact.usage_time], now)
    charge = ledger.usage_charge(
        entry_kind,
        organization_id=fact.organization_id,
        project_id=fact.project_id,
        resource=fact.resource,
        work_keys=[fact.work_key],
        amount_nanos_usd=quantity * unit_price_nanos_usd,
        price_book_version=price_book_version,
        usage_time=fact.usage_time,
    )
    record = UsageRecord(
        work_key=fact.work_key,
        kind=usage_kind,
        organization_id=fact.organization_id,
        project_id=fact.project_id,
        resource=fact.resource,
        model=fact.hardware_type,
        quantity=quantity,
        unit_price_nanos_usd=unit_price_nanos_usd,
        amount_nanos_usd=quantity * unit_price_nanos_usd,
        price_book_version=price_book_version,
        start_step=0,
        end_step=0,
        usage_time=fact.usage_time,
        billing_month=months.of(fact.organization_id, fact.usage_time),
        transaction_id=charge.id if charge else None,
    )
    if await usage_store.insert_usage(connection, UsageBatch.of([record])):
        await store.post(connection, standings, [charge] if charge else [])
        _booked.add(1, {"kind": usage_kind})
        return
    key = (record.project_id, record.work_key)
    if (await usage_store.get_usage(connection, [key]))[key].claim != record.claim:
        raise InvalidArgument("EVENT_INVALID", f"work key {record.work_key!r} is booked with other numbers")
