"""Work of jobs becomes money: usage is booked once per work key and jobs are settled once. It runs in the consumer's
transaction, so an event and its effect are one; it knows no message format, and nothing of what is served.

Locks are taken in one order everywhere: the job, then organizations sorted by id.
"""

from datetime import datetime

import structlog
from opentelemetry import metrics

from chassis.db.pool import Connection
from chassis.errors import InvalidArgument, NotFound
from services.billing import ledger, settlement, store, usage_store
from services.billing.batch import UsageBatch
from services.billing.facts import Fact, TrainingFact
from services.billing.ledger import HoldState
from services.billing.months import OpenMonths
from services.billing.periods import first_of_month
from services.billing.pricebook import PriceBook, Shelf
from services.billing.pricing import Metered, record_amount
from services.billing.records import Hold, JobEnding, JobTotals, UsageKind, UsageRecord

_log = structlog.get_logger(__name__)
_meter = metrics.get_meter(__name__)
_booked = _meter.create_counter("billing.usage_records", unit="{record}")
_settled = _meter.create_counter("billing.settlements", unit="{job}")
_discrepancies = _meter.create_counter("billing.discrepancies", unit="{job}")

_TOKENS_OF = {UsageKind.TRAINING_TOKENS: "training_tokens", UsageKind.EVALUATION_TOKENS: "validation_tokens"}


async def book_training(connection: Connection, shelf: Shelf, fact: TrainingFact, now: datetime) -> bool:
    """Books tokens of a job at the prices of its quote, and settles the job when they were the last it waited for.

    True when that moved money.
    """
    await store.lock_job(connection, fact.resource)
    hold = await store.get_hold(connection, fact.resource)
    if hold is None:
        # Holds are committed before a job can run, so this waits only for a database that was restored to the past.
        raise NotFound("EVENT_INVALID", f"{fact.resource} has no hold, so its tokens have no price")
    _same_owner(fact, hold)
    record = _training_record(fact, hold, shelf.version(hold.price_book_version))
    if not await _is_new(connection, record):
        return False
    await _refuse_unexpected(connection, fact, hold)
    inserted = await usage_store.insert_usage(connection, UsageBatch.of([record]))
    assert inserted, "the job is locked, so nobody else can have booked its work"
    _booked.add(1, {"kind": record.kind})
    if hold.state is HoldState.SETTLED:
        # Nothing was owed, so nobody waited for it; the charge stays and what it is less than its work grows.
        await store.adjust_hold(connection, hold.resource, -record.amount_nanos_usd)
    return await _settle_when_ready(connection, shelf, hold, now)


async def book_ending(connection: Connection, shelf: Shelf, ending: JobEnding, now: datetime) -> bool:
    """Remembers how the job ended and settles it as soon as its usage is complete. True when that moved money."""
    await store.lock_job(connection, ending.resource)
    before = await store.get_job_ending(connection, ending.resource)
    if before == ending:
        return False
    if before is not None:
        raise InvalidArgument("EVENT_INVALID", f"{ending.resource} ended as {before.ending} before")
    hold = await store.get_hold(connection, ending.resource)
    if hold is not None and (hold.organization_id, hold.project_id) != (ending.organization_id, ending.project_id):
        raise InvalidArgument("EVENT_INVALID", f"{ending.resource} belongs to another project")
    booked = (await usage_store.get_job_totals(connection, ending.resource)).record_count
    if booked > ending.usage_record_count:
        # Had it come first, those records would have been refused: what is booked must not depend on the order.
        raise InvalidArgument(
            "EVENT_INVALID",
            f"{ending.resource} ended with {ending.usage_record_count} usage records, but {booked} are booked",
        )
    await store.insert_job_ending(connection, ending)
    return hold is not None and await _settle_when_ready(connection, shelf, hold, now)


async def _settle_when_ready(connection: Connection, shelf: Shelf, hold: Hold, now: datetime) -> bool:
    """Settles a held job whose ending is known and whose usage is complete, or does not matter."""
    if hold.state is not HoldState.HELD:
        return False
    ending = await store.get_job_ending(connection, hold.resource)
    if ending is None:
        return False
    totals = await usage_store.get_job_totals(connection, hold.resource)
    if settlement.needs_all_usage(ending.ending) and totals.record_count < ending.usage_record_count:
        return False
    await settle(connection, shelf, hold, ending, totals, now)
    return True


async def settle(
    connection: Connection,
    shelf: Shelf,
    hold: Hold,
    ending: JobEnding,
    totals: JobTotals,
    now: datetime,
    note: str = "",
) -> None:
    """Charges what is booked and frees the rest. The job is locked; `note` says what is unusual about it."""
    book = shelf.version(hold.price_book_version)
    decided = settlement.settle(
        ending=ending.ending,
        held_nanos_usd=hold.held_nanos_usd,
        rule=book.tuning_rule,
        nanos_usd_per_million=_rate(hold, book),
        work=hold.work,
        metered=Metered(training_tokens=totals.training_tokens, validation_tokens=totals.evaluation_tokens),
    )
    discrepancy = "; ".join(filter(None, (note, decided.discrepancy)))
    if discrepancy:
        _discrepancies.add(1)
        _log.error("settlement_discrepancy", resource=hold.resource, discrepancy=discrepancy)
    standings = await store.lock_organizations(connection, [hold.organization_id])
    entry = ledger.settle(
        organization_id=hold.organization_id,
        resource=hold.resource,
        held_nanos_usd=hold.held_nanos_usd,
        charge_nanos_usd=decided.charge_nanos_usd,
        price_book_version=hold.price_book_version,
        end_time=ending.end_time,
    )
    months = await OpenMonths.read(connection, [hold.organization_id], [ending.end_time], now)
    settled = await store.end_hold(
        connection,
        hold.resource,
        "settle",
        end_time=ending.end_time,
        charged_nanos_usd=decided.charge_nanos_usd,
        price=decided.price,
        adjustment_nanos_usd=decided.charge_nanos_usd - totals.amount_nanos_usd,
        billing_month=months.of(hold.organization_id, ending.end_time),
        discrepancy=discrepancy,
    )
    assert settled, "the job is locked, so nobody else can have ended its hold"
    await store.post(connection, standings, [entry] if entry else [])
    _settled.add(1, {"ending": ending.ending})


async def _is_new(connection: Connection, record: UsageRecord) -> bool:
    key = (record.project_id, record.work_key)
    booked = (await usage_store.get_usage(connection, [key])).get(key)
    if booked is None:
        return True
    # The price may differ: another version of the book can have come into force for a moment of the past.
    if booked.claim != record.claim:
        raise InvalidArgument("EVENT_INVALID", f"work key {record.work_key!r} is booked with other numbers")
    return False


async def _refuse_unexpected(connection: Connection, fact: TrainingFact, hold: Hold) -> None:
    """What the job's other facts contradict waits among the dead letters for a person."""
    if hold.state is HoldState.RELEASED:
        # Whether or not its ending came before: what is booked must not depend on the order.
        raise InvalidArgument("EVENT_INVALID", f"the hold of {fact.resource} was released, so it cannot have run")
    ending = await store.get_job_ending(connection, fact.resource)
    if ending is not None:
        booked = (await usage_store.get_job_totals(connection, fact.resource)).record_count
        if booked >= ending.usage_record_count:
            raise InvalidArgument(
                "EVENT_INVALID",
                f"{fact.resource} ended with {ending.usage_record_count} usage records and all are booked;"
                f" {fact.work_key!r} is one more",
            )
    waited_for = ending is not None and settlement.needs_all_usage(ending.ending)
    if hold.state is HoldState.EXPIRED or (hold.state is HoldState.SETTLED and waited_for):
        raise InvalidArgument("EVENT_INVALID", f"the hold of {fact.resource} expired before {fact.work_key!r} came")
    if fact.kind is UsageKind.TRAINING_TOKENS:
        other = await usage_store.get_overlapping_work_key(
            connection, fact.resource, start_step=fact.start_step, end_step=fact.end_step
        )
        if other is not None:
            raise InvalidArgument(
                "EVENT_INVALID", f"steps of {fact.work_key!r} are booked under {other!r}; they would be paid twice"
            )


def _same_owner(fact: Fact, hold: Hold) -> None:
    if (fact.organization_id, fact.project_id) != (hold.organization_id, hold.project_id):
        raise InvalidArgument("EVENT_INVALID", f"{fact.resource} belongs to another project")


def _training_record(fact: TrainingFact, hold: Hold, book: PriceBook) -> UsageRecord:
    rate = _rate(hold, book)
    return UsageRecord(
        work_key=fact.work_key,
        kind=fact.kind,
        organization_id=fact.organization_id,
        project_id=fact.project_id,
        resource=fact.resource,
        model=hold.work.base_model,
        quantity=fact.tokens,
        unit_price_nanos_usd=rate,
        amount_nanos_usd=record_amount(book.tuning_rule, rate, hold.work, _TOKENS_OF[fact.kind], fact.tokens),
        price_book_version=book.version,
        start_step=fact.start_step,
        end_step=fact.end_step,
        usage_time=fact.usage_time,
        # The invoice has the settlement; this says when the work was done.
        billing_month=first_of_month(fact.usage_time),
        api_key_id=hold.api_key_id,
    )


def _rate(hold: Hold, book: PriceBook) -> int:
    return book.tuning_rate(hold.work.base_model, hold.work.method, hold.work.parameter_count)
