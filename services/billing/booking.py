"""Metered work becomes money: usage is booked once per work key and jobs are settled once. It runs in the consumer's
transaction, so an event and its effect are one; it knows no message format.

Locks are taken in one order everywhere: the job, then usage keys, then accounts sorted by name.
"""

import uuid
from collections.abc import Sequence

import structlog
from opentelemetry import metrics

from chassis.db.pool import Connection
from chassis.errors import InvalidArgument, NotFound
from services.billing import ledger, settlement, store
from services.billing.facts import EndpointFact, Fact, InferenceFact, TrainingFact
from services.billing.ledger import HoldState, Transaction, TransactionKind
from services.billing.pricebook import PriceBook, Shelf
from services.billing.pricing import Metered, record_amount, token_amount
from services.billing.records import Hold, JobEnding, UsageKind, UsageRecord

_log = structlog.get_logger(__name__)
_meter = metrics.get_meter(__name__)
_booked = _meter.create_counter("billing.usage_records", unit="{record}")
_settled = _meter.create_counter("billing.settlements", unit="{job}")
_discrepancies = _meter.create_counter("billing.discrepancies", unit="{job}")

_TOKENS_OF = {UsageKind.TRAINING_TOKENS: "training_tokens", UsageKind.EVALUATION_TOKENS: "validation_tokens"}


async def book_training(connection: Connection, shelf: Shelf, fact: TrainingFact) -> None:
    """Books tokens of a job at the prices of its quote, and settles the job when they were the last it waited for."""
    await store.lock_job(connection, fact.resource)
    hold = await store.get_hold(connection, fact.resource)
    if hold is None:
        # Holds are committed before a job can run, so this waits only for a database that was restored to the past.
        raise NotFound("EVENT_INVALID", f"{fact.resource} has no hold, so its tokens have no price")
    _same_owner(fact, hold)
    record = _training_record(fact, hold, shelf.version(hold.price_book_version))
    if not await _is_new(connection, record):
        return
    await _refuse_unexpected(connection, fact, hold)
    await store.insert_usage(connection, [record])
    _booked.add(1, {"kind": record.kind})
    await _settle_when_ready(connection, shelf, hold)


async def book_ending(connection: Connection, shelf: Shelf, ending: JobEnding) -> None:
    """Remembers how the job ended and settles it as soon as its usage is complete."""
    await store.lock_job(connection, ending.resource)
    before = await store.get_job_ending(connection, ending.resource)
    if before == ending:
        return
    if before is not None:
        raise InvalidArgument("EVENT_INVALID", f"{ending.resource} ended as {before.ending} before")
    hold = await store.get_hold(connection, ending.resource)
    if hold is not None and (hold.organization_id, hold.project_id) != (ending.organization_id, ending.project_id):
        raise InvalidArgument("EVENT_INVALID", f"{ending.resource} belongs to another project")
    await store.insert_job_ending(connection, ending)
    if hold is not None:
        await _settle_when_ready(connection, shelf, hold)


async def book_inference(connection: Connection, shelf: Shelf, facts: Sequence[InferenceFact]) -> None:
    """Books served tokens at the prices of the moment they were served: what is owed grows, nothing is refused."""
    records: list[UsageRecord] = []
    charges: dict[uuid.UUID, Transaction] = {}
    for fact in facts:
        sides = _inference_records(fact, shelf.at(fact.usage_time))
        records += sides
        charge = ledger.usage_charge(
            TransactionKind.INFERENCE,
            organization_id=fact.organization_id,
            project_id=fact.project_id,
            resource=fact.resource,
            work_key=fact.work_key,
            amount_nanos_usd=sum(side.amount_nanos_usd for side in sides),
            price_book_version=shelf.at(fact.usage_time).version,
            usage_time=fact.usage_time,
        )
        if charge is not None:
            charges.setdefault(sides[0].id, charge)
    await _book_charged(connection, records, charges)


async def book_endpoint_minute(connection: Connection, shelf: Shelf, fact: EndpointFact) -> None:
    """Books one started minute of all devices of a replica."""
    book = shelf.at(fact.usage_time)
    minute_price = book.hosting_rate(fact.hardware_type).nanos_usd_per_device_minute
    record = _record(
        fact,
        work_key=fact.work_key,
        kind=UsageKind.ENDPOINT_MINUTES,
        model=fact.hardware_type,
        quantity=fact.device_count,
        unit_price_nanos_usd=minute_price,
        amount_nanos_usd=fact.device_count * minute_price,
        price_book_version=book.version,
    )
    charge = ledger.usage_charge(
        TransactionKind.ENDPOINT,
        organization_id=fact.organization_id,
        project_id=fact.project_id,
        resource=fact.resource,
        work_key=fact.work_key,
        amount_nanos_usd=record.amount_nanos_usd,
        price_book_version=book.version,
        usage_time=fact.usage_time,
    )
    await _book_charged(connection, [record], {record.id: charge} if charge else {})


async def _book_charged(
    connection: Connection, records: Sequence[UsageRecord], charges: dict[uuid.UUID, Transaction]
) -> None:
    """Inserts records, and posts the charges of those that are new."""
    if not records:
        return
    new = await store.insert_usage(connection, records)
    if len(new) < len(records):
        booked = await store.get_usage(connection, {record.id for record in records})
        for record in records:
            _same_record(booked[record.id], record)
    due = [charge for record_id, charge in charges.items() if record_id in new]
    await store.lock_accounts(connection, {charge.organization_id for charge in due})
    await store.post(connection, due)
    _booked.add(len(new))


async def _settle_when_ready(connection: Connection, shelf: Shelf, hold: Hold) -> None:
    """Settles a held job whose ending is known and whose usage is complete, or does not matter."""
    if hold.state is not HoldState.HELD:
        return
    ending = await store.get_job_ending(connection, hold.resource)
    if ending is None:
        return
    totals = await store.get_job_totals(connection, hold.resource)
    if settlement.needs_all_usage(ending.ending) and totals.record_count < ending.usage_record_count:
        return
    book = shelf.version(hold.price_book_version)
    decided = settlement.settle(
        ending=ending.ending,
        held_nanos_usd=hold.held_nanos_usd,
        rule=book.tuning_rule,
        nanos_usd_per_million=_rate(hold, book),
        work=hold.work,
        metered=Metered(training_tokens=totals.training_tokens, validation_tokens=totals.evaluation_tokens),
    )
    if decided.discrepancy:
        _discrepancies.add(1)
        _log.error("settlement_discrepancy", resource=hold.resource, discrepancy=decided.discrepancy)
    await store.lock_accounts(connection, [hold.organization_id])
    entry = ledger.settle(
        organization_id=hold.organization_id,
        resource=hold.resource,
        held_nanos_usd=hold.held_nanos_usd,
        charge_nanos_usd=decided.charge_nanos_usd,
        price_book_version=hold.price_book_version,
        end_time=ending.end_time,
    )
    settled = await store.end_hold(
        connection,
        hold.resource,
        "settle",
        end_time=ending.end_time,
        charged_nanos_usd=decided.charge_nanos_usd,
        price=decided.price,
        discrepancy=decided.discrepancy,
    )
    assert settled, "the job is locked, so nobody else can have ended its hold"
    await store.post(connection, [entry] if entry else [])
    _settled.add(1, {"ending": ending.ending})


async def _is_new(connection: Connection, record: UsageRecord) -> bool:
    booked = (await store.get_usage(connection, [record.id])).get(record.id)
    if booked is None:
        return True
    _same_record(booked, record)
    return False


async def _refuse_unexpected(connection: Connection, fact: TrainingFact, hold: Hold) -> None:
    """What the job's other facts contradict waits among the dead letters for a person."""
    ending = await store.get_job_ending(connection, fact.resource)
    if ending is None and hold.state is not HoldState.HELD:
        raise InvalidArgument("EVENT_INVALID", f"the hold of {fact.resource} was released, so it cannot have run")
    if ending is not None:
        booked = (await store.get_job_totals(connection, fact.resource)).record_count
        if booked >= ending.usage_record_count:
            raise InvalidArgument(
                "EVENT_INVALID",
                f"{fact.resource} ended with {ending.usage_record_count} usage records and all are booked;"
                f" {fact.work_key!r} is one more",
            )
    if fact.kind is UsageKind.TRAINING_TOKENS:
        other = await store.get_overlapping_work_key(
            connection, fact.resource, start_step=fact.start_step, end_step=fact.end_step
        )
        if other is not None:
            raise InvalidArgument(
                "EVENT_INVALID", f"steps of {fact.work_key!r} are booked under {other!r}; they would be paid twice"
            )


def _same_owner(fact: Fact, hold: Hold) -> None:
    if (fact.organization_id, fact.project_id) != (hold.organization_id, hold.project_id):
        raise InvalidArgument("EVENT_INVALID", f"{fact.resource} belongs to another project")


def _same_record(booked: UsageRecord, claimed: UsageRecord) -> None:
    """The price may differ: another version of the book can have come into force for a moment of the past."""
    if booked.claim != claimed.claim:
        raise InvalidArgument("EVENT_INVALID", f"work key {claimed.work_key!r} is booked with other numbers")


def _training_record(fact: TrainingFact, hold: Hold, book: PriceBook) -> UsageRecord:
    rate = _rate(hold, book)
    return _record(
        fact,
        work_key=fact.work_key,
        kind=fact.kind,
        model=hold.work.base_model,
        quantity=fact.tokens,
        unit_price_nanos_usd=rate,
        amount_nanos_usd=record_amount(book.tuning_rule, rate, hold.work, _TOKENS_OF[fact.kind], fact.tokens),
        price_book_version=book.version,
        start_step=fact.start_step,
        end_step=fact.end_step,
    )


def _inference_records(fact: InferenceFact, book: PriceBook) -> list[UsageRecord]:
    """One record for each direction, without those of zero tokens."""
    rate = book.inference_rate(fact.base_model)
    sides = (
        ("input", UsageKind.INPUT_TOKENS, fact.input_tokens, rate.input_nanos_usd_per_million),
        ("output", UsageKind.OUTPUT_TOKENS, fact.output_tokens, rate.output_nanos_usd_per_million),
    )
    return [
        _record(
            fact,
            work_key=f"{fact.work_key}:{side}",
            kind=kind,
            model=fact.base_model,
            quantity=tokens,
            unit_price_nanos_usd=nanos_usd_per_million,
            amount_nanos_usd=token_amount(tokens, nanos_usd_per_million),
            price_book_version=book.version,
        )
        for side, kind, tokens, nanos_usd_per_million in sides
        if tokens
    ]


def _record(
    fact: Fact,
    *,
    work_key: str,
    kind: UsageKind,
    model: str,
    quantity: int,
    unit_price_nanos_usd: int,
    amount_nanos_usd: int,
    price_book_version: str,
    start_step: int = 0,
    end_step: int = 0,
) -> UsageRecord:
    return UsageRecord(
        id=ledger.usage_record_id(fact.project_id, work_key),
        work_key=work_key,
        kind=kind,
        organization_id=fact.organization_id,
        project_id=fact.project_id,
        resource=fact.resource,
        model=model,
        quantity=quantity,
        unit_price_nanos_usd=unit_price_nanos_usd,
        amount_nanos_usd=amount_nanos_usd,
        price_book_version=price_book_version,
        start_step=start_step,
        end_step=end_step,
        usage_time=fact.usage_time,
    )


def _rate(hold: Hold, book: PriceBook) -> int:
    return book.tuning_rate(hold.work.base_model, hold.work.method, hold.work.parameter_count)
