"""Books started minutes of an endpoint's devices and started hours of a cluster's nodes. Not pure: database.

It runs in the consumer's transaction, so an event and its effect are one. It knows no message format. Nothing is
refused for lack of credit: what ran is owed.
"""

from datetime import datetime

from opentelemetry import metrics

from chassis.db.pool import Connection
from chassis.errors import InvalidArgument
from services.billing.leasing.recall import recall_uncovered
from services.billing.ledger import entries
from services.billing.ledger.entries import TransactionKind
from services.billing.ledger.store import LedgerStore
from services.billing.prices.catalogue import Catalogue
from services.billing.usage.batch import UsageBatch
from services.billing.usage.records import ClusterFact, EndpointFact, UsageKind, UsageRecord
from services.billing.usage.store import UsageStore

_booked = metrics.get_meter(__name__).create_counter("billing.usage_records", unit="{record}")


async def book_endpoint_minute(connection: Connection, catalogue: Catalogue, fact: EndpointFact, now: datetime) -> None:
    """Books one started minute of all devices of a replica."""
    book = catalogue.at(fact.usage_time)
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


async def book_cluster_hour(connection: Connection, catalogue: Catalogue, fact: ClusterFact, now: datetime) -> None:
    """Books one started hour of all nodes of a cluster."""
    book = catalogue.at(fact.usage_time)
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
    ledger = LedgerStore(connection)
    usage = UsageStore(connection)
    standings = await ledger.lock([fact.organization_id])
    months = await ledger.open_months([fact.organization_id], [fact.usage_time], now)
    charge = entries.usage_charge(
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
    if await usage.insert(UsageBatch.of([record])):
        await ledger.post(standings, [charge] if charge else [])
        balances = standings[fact.organization_id].balances
        await recall_uncovered(connection, fact.organization_id, fact.project_id, balances, now)
        _booked.add(1, {"kind": usage_kind})
        return
    key = (record.project_id, record.work_key)
    if (await usage.get([key]))[key].claim != record.claim:
        raise InvalidArgument("EVENT_INVALID", f"work key {record.work_key!r} is booked with other numbers")
