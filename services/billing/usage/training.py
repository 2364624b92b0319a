"""Books the tokens of jobs, once per work key, and settles jobs that ended. Not pure: database.

It runs in the consumer's transaction, so an event and its effect are one. It knows no message format, and nothing of
what is served. Locks are taken in one order everywhere: the job, then organizations sorted by id.
"""

from datetime import datetime

from opentelemetry import metrics

from chassis.db.pool import Connection
from chassis.errors import InvalidArgument, NotFound
from services.billing.calendar import first_of_month
from services.billing.holds import settlement
from services.billing.holds.hold import Hold, HoldState, JobEnding
from services.billing.holds.holding import settle_hold
from services.billing.holds.store import HoldStore
from services.billing.prices.catalogue import Catalogue
from services.billing.prices.pricebook import PriceBook
from services.billing.prices.pricing import record_amount
from services.billing.usage.batch import UsageBatch
from services.billing.usage.records import RULE_TOKENS, Fact, TrainingFact, UsageKind, UsageRecord
from services.billing.usage.store import UsageStore

_booked = metrics.get_meter(__name__).create_counter("billing.usage_records", unit="{record}")


async def book_training(connection: Connection, catalogue: Catalogue, fact: TrainingFact, now: datetime) -> bool:
    """Books tokens of a job at the prices of its quote, and settles the job when they were the last it waited for.

    True when that moved money.
    """
    holds = HoldStore(connection)
    await holds.lock_job(fact.resource)
    hold = await holds.get(fact.resource)
    if hold is None:
        # Holds are committed before a job can run, so this waits only for a database that was restored to the past.
        raise NotFound("EVENT_INVALID", f"{fact.resource} has no hold, so its tokens have no price")
    _same_owner(fact, hold)
    record = _training_record(fact, hold, catalogue.version(hold.price_book_version))
    if not await _is_new(connection, record):
        return False
    await _refuse_unexpected(connection, fact, hold)
    inserted = await UsageStore(connection).insert(UsageBatch.of([record]))
    assert inserted, "the job is locked, so nobody else can have booked its work"
    _booked.add(1, {"kind": record.kind})
    if hold.state is HoldState.SETTLED:
        # Nothing was owed, so nobody waited for it; the charge stays and what it is less than its work grows.
        await holds.adjust(hold.resource, -record.amount_nanos_usd)
    return await _settle_when_ready(connection, catalogue, hold, now)


async def book_ending(connection: Connection, catalogue: Catalogue, ending: JobEnding, now: datetime) -> bool:
    """Remembers how the job ended and settles it as soon as its usage is complete. True when that moved money."""
    holds = HoldStore(connection)
    await holds.lock_job(ending.resource)
    before = await holds.get_ending(ending.resource)
    if before == ending:
        return False
    if before is not None:
        raise InvalidArgument("EVENT_INVALID", f"{ending.resource} ended as {before.ending} before")
    hold = await holds.get(ending.resource)
    if hold is not None and (hold.organization_id, hold.project_id) != (ending.organization_id, ending.project_id):
        raise InvalidArgument("EVENT_INVALID", f"{ending.resource} belongs to another project")
    booked = (await holds.get_job_totals(ending.resource)).record_count
    if booked > ending.usage_record_count:
        # Had it come first, those records would have been refused: what is booked must not depend on the order.
        raise InvalidArgument(
            "EVENT_INVALID",
            f"{ending.resource} ended with {ending.usage_record_count} usage records, but {booked} are booked",
        )
    await holds.insert_ending(ending)
    return hold is not None and await _settle_when_ready(connection, catalogue, hold, now)


async def _settle_when_ready(connection: Connection, catalogue: Catalogue, hold: Hold, now: datetime) -> bool:
    """Settles a held job whose ending is known and whose usage is complete, or does not matter."""
    holds = HoldStore(connection)
    if hold.state is not HoldState.HELD:
        return False
    ending = await holds.get_ending(hold.resource)
    if ending is None:
        return False
    totals = await holds.get_job_totals(hold.resource)
    if settlement.needs_all_usage(ending.ending) and totals.record_count < ending.usage_record_count:
        return False
    await settle_hold(connection, catalogue, hold, ending, totals, now)
    return True


async def _is_new(connection: Connection, record: UsageRecord) -> bool:
    key = (record.project_id, record.work_key)
    booked = (await UsageStore(connection).get([key])).get(key)
    if booked is None:
        return True
    # The price may differ: another version of the book can have come into force for a moment of the past.
    if booked.claim != record.claim:
        raise InvalidArgument("EVENT_INVALID", f"work key {record.work_key!r} is booked with other numbers")
    return False


async def _refuse_unexpected(connection: Connection, fact: TrainingFact, hold: Hold) -> None:
    """What the job's other facts contradict waits among the dead letters for a person."""
    holds = HoldStore(connection)
    if hold.state is HoldState.RELEASED:
        # Whether or not its ending came before: what is booked must not depend on the order.
        raise InvalidArgument("EVENT_INVALID", f"the hold of {fact.resource} was released, so it cannot have run")
    ending = await holds.get_ending(fact.resource)
    if ending is not None:
        booked = (await holds.get_job_totals(fact.resource)).record_count
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
        other = await UsageStore(connection).get_overlapping_work_key(
            fact.resource, start_step=fact.start_step, end_step=fact.end_step
        )
        if other is not None:
            raise InvalidArgument(
                "EVENT_INVALID", f"steps of {fact.work_key!r} are booked under {other!r}; they would be paid twice"
            )


def _same_owner(fact: Fact, hold: Hold) -> None:
    if (fact.organization_id, fact.project_id) != (hold.organization_id, hold.project_id):
        raise InvalidArgument("EVENT_INVALID", f"{fact.resource} belongs to another project")


def _training_record(fact: TrainingFact, hold: Hold, book: PriceBook) -> UsageRecord:
    rate = book.work_rate(hold.work)
    return UsageRecord(
        work_key=fact.work_key,
        kind=fact.kind,
        organization_id=fact.organization_id,
        project_id=fact.project_id,
        resource=fact.resource,
        model=hold.work.base_model,
        quantity=fact.tokens,
        unit_price_nanos_usd=rate,
        amount_nanos_usd=record_amount(book.tuning_rule, rate, hold.work, RULE_TOKENS[fact.kind], fact.tokens),
        price_book_version=book.version,
        start_step=fact.start_step,
        end_step=fact.end_step,
        usage_time=fact.usage_time,
        # The invoice has the settlement; this says when the work was done.
        billing_month=first_of_month(fact.usage_time),
        api_key_id=hold.api_key_id,
    )
