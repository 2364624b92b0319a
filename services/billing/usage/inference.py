"""Books served tokens. Not pure: database.

It runs in the consumer's transaction, so an event and its effect are one. It knows no message format, and nothing of
jobs and machines.

A message brings hundreds of calls, so records are booked as columns and posted as one ledger transaction for each
group of calls that share organization, project, resource, price and month. Nothing is refused for lack of credit:
what was served is owed.
"""

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import NamedTuple, TypeAlias

from opentelemetry import metrics

from chassis.db.pool import Connection
from services.billing.calendar import OpenMonths, first_of_month
from services.billing.leasing.store import Drawn, LeaseStore
from services.billing.ledger import entries
from services.billing.ledger.entries import Transaction, TransactionKind
from services.billing.ledger.store import LedgerStore
from services.billing.prices.catalogue import Catalogue
from services.billing.prices.pricebook import InferenceRate
from services.billing.prices.pricing import PriceUnknown, token_amount
from services.billing.usage.batch import Terms, UsageBatch
from services.billing.usage.records import InferenceFact, UsageKind, UsageRecord
from services.billing.usage.store import UsageStore
from services.billing.usage.work_keys import SIDES

_booked = metrics.get_meter(__name__).create_counter("billing.usage_records", unit="{record}")

_INPUT, _OUTPUT = SIDES[UsageKind.INPUT_TOKENS], SIDES[UsageKind.OUTPUT_TOKENS]
# A call, and why it cannot be booked.
_Refusal: TypeAlias = tuple[InferenceFact, str]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A call that cannot be booked: `index` is its place among the facts."""

    index: int
    error: str


class _GroupKey(NamedTuple):
    organization_id: str
    project_id: str
    resource: str
    base_model: str
    price_book_version: str
    # Of the use. Which invoice has it must not matter here: a replay meets other closed months and must write the same
    # entries.
    month: date
    api_key_id: str


@dataclass(kw_only=True)
class _Group:
    """Calls of one ledger transaction."""

    key: _GroupKey
    rate: InferenceRate
    facts: list[InferenceFact] = field(default_factory=list)

    def charge(self, amount_nanos_usd: int) -> Transaction | None:
        return entries.usage_charge(
            TransactionKind.INFERENCE,
            organization_id=self.key.organization_id,
            project_id=self.key.project_id,
            resource=self.key.resource,
            # Sorted: the id must not depend on the order in which calls ended up in the message.
            work_keys=sorted(fact.work_key for fact in self.facts),
            amount_nanos_usd=amount_nanos_usd,
            price_book_version=self.key.price_book_version,
            usage_time=max(fact.usage_time for fact in self.facts),
        )


@dataclass(frozen=True, kw_only=True)
class _Booking:
    """What is written of calls: their records, the entries that charge them, and what it lowers their leases by."""

    batch: UsageBatch
    charges: list[Transaction]
    draws: list[Drawn]


async def book_inference(
    connection: Connection, catalogue: Catalogue, facts: Sequence[InferenceFact], now: datetime
) -> list[Refused]:
    """Books calls at the prices of the moment they were served and returns those that no later attempt can book.

    A call that is booked already changes nothing; one that is booked with other numbers is refused.
    """
    ledger = LedgerStore(connection)
    usage = UsageStore(connection)
    organization_ids = sorted({fact.organization_id for fact in facts})
    moments = [min(fact.usage_time for fact in facts)] if facts else []
    facts_by_key, refused = _distinct(facts)
    groups, unpriced = _groups(list(facts_by_key.values()), catalogue)
    refused += unpriced
    # Priced before the lock, which is held for as short as it can be; only an invoice that was closed meanwhile changes
    # what was found.
    expected = await ledger.open_months(organization_ids, moments, now)
    booking = _columns(groups, expected)
    standings = await ledger.lock(organization_ids)
    months = await ledger.open_months(organization_ids, moments, now)
    if months != expected:
        booking = _columns(groups, months)
    # Nearly always everything is new; if not, each call is looked at.
    if not await usage.insert(booking.batch):
        booked = await _booked_calls(connection, groups)
        refused += _drop_booked(groups, booked)
        booking = _columns(groups, months)
        inserted = await usage.insert(booking.batch)
        assert inserted, "the organizations are locked, so nobody else can have booked their calls"
    await ledger.post(standings, booking.charges)
    # What left the balance is no longer reserved: in the same transaction, so that nothing counts twice.
    await LeaseStore(connection).draw(booking.draws)
    _booked.add(len(booking.batch))
    positions = {id(fact): index for index, fact in enumerate(facts)}
    return [Refused(index=positions[id(fact)], error=error) for fact, error in refused]


def _distinct(facts: Sequence[InferenceFact]) -> tuple[dict[tuple[str, str], InferenceFact], list[_Refusal]]:
    """The first of each work key; a second one with other numbers is refused, an equal one is the same."""
    found: dict[tuple[str, str], InferenceFact] = {}
    refused: list[_Refusal] = []
    for fact in facts:
        first = found.setdefault((fact.project_id, fact.work_key), fact)
        if first.claim != fact.claim:
            refused.append((fact, f"work key {fact.work_key!r} comes twice with different numbers"))
    return found, refused


def _groups(facts: Sequence[InferenceFact], catalogue: Catalogue) -> tuple[list[_Group], list[_Refusal]]:
    groups: dict[_GroupKey, _Group] = {}
    refused: list[_Refusal] = []
    for fact in facts:
        if not fact.input_tokens and not fact.output_tokens:
            # Leaves no record, so the entry's id, which is computed again from its records, must not depend on it.
            continue
        try:
            book = catalogue.at(fact.usage_time)
            key = _GroupKey(
                fact.organization_id,
                fact.project_id,
                fact.resource,
                fact.base_model,
                book.version,
                first_of_month(fact.usage_time),
                fact.api_key_id,
            )
            group = groups.get(key)
            if group is None:
                groups[key] = group = _Group(key=key, rate=book.inference_rate(fact.base_model))
        except PriceUnknown as error:
            refused.append((fact, str(error)))
            continue
        group.facts.append(fact)
    return list(groups.values()), refused


def _columns(groups: Sequence[_Group], months: OpenMonths) -> _Booking:
    """The records of all groups, one for each direction without those of zero tokens, and what they are charged."""
    batch = UsageBatch()
    charges: list[Transaction] = []
    drawn: Counter[tuple[str, str]] = Counter()
    for group in groups:
        if not group.facts:
            continue
        read = group.rate.input_nanos_usd_per_million
        written = group.rate.output_nanos_usd_per_million
        inputs = [token_amount(fact.input_tokens, read) for fact in group.facts]
        outputs = [token_amount(fact.output_tokens, written) for fact in group.facts]
        charge = group.charge(sum(inputs) + sum(outputs))
        if charge is not None:
            charges.append(charge)
        posted = charge.id if charge else None
        month = months.of(group.key.organization_id, group.facts[0].usage_time)
        input_number = batch.number(_terms(UsageKind.INPUT_TOKENS, group.key, read, month, posted))
        output_number = batch.number(_terms(UsageKind.OUTPUT_TOKENS, group.key, written, month, posted))
        for fact, input_amount, output_amount in zip(group.facts, inputs, outputs, strict=True):
            if fact.input_tokens:
                batch.add(input_number, fact.work_key + _INPUT, fact.input_tokens, input_amount, fact.usage_time)
            if fact.output_tokens:
                batch.add(output_number, fact.work_key + _OUTPUT, fact.output_tokens, output_amount, fact.usage_time)
            if fact.credit_lease_id:
                drawn[(fact.credit_lease_id, fact.organization_id)] += input_amount + output_amount
    draws = [Drawn(lease_id=lease, organization_id=whose, amount_nanos_usd=n) for (lease, whose), n in drawn.items()]
    return _Booking(batch=batch, charges=charges, draws=draws)


def _terms(
    kind: UsageKind, key: _GroupKey, unit_price_nanos_usd: int, billing_month: date, transaction_id: uuid.UUID | None
) -> Terms:
    return Terms(
        kind=kind,
        organization_id=key.organization_id,
        project_id=key.project_id,
        resource=key.resource,
        model=key.base_model,
        unit_price_nanos_usd=unit_price_nanos_usd,
        price_book_version=key.price_book_version,
        billing_month=billing_month,
        api_key_id=key.api_key_id,
        transaction_id=transaction_id,
    )


async def _booked_calls(connection: Connection, groups: Sequence[_Group]) -> dict[tuple[str, str], UsageRecord]:
    return await UsageStore(connection).get(
        [
            (fact.project_id, fact.work_key + side)
            for group in groups
            for fact in group.facts
            for side in (_INPUT, _OUTPUT)
        ],
    )


def _drop_booked(groups: Sequence[_Group], booked: dict[tuple[str, str], UsageRecord]) -> list[_Refusal]:
    """Leaves the calls that are not booked in the groups, and returns those that are booked with other numbers."""
    refused: list[_Refusal] = []
    for group in groups:
        left = []
        for fact in group.facts:
            sides = [booked.get((fact.project_id, fact.work_key + side)) for side in (_INPUT, _OUTPUT)]
            if not any(sides):
                left.append(fact)
            elif not _agrees(fact, sides):
                refused.append((fact, f"work key {fact.work_key!r} is booked with other numbers"))
        group.facts = left
    return refused


def _agrees(fact: InferenceFact, sides: Sequence[UsageRecord | None]) -> bool:
    if [side.quantity if side else 0 for side in sides] != [fact.input_tokens, fact.output_tokens]:
        return False
    owner = (fact.organization_id, fact.resource, fact.base_model)
    return all(side is None or (side.organization_id, side.resource, side.model) == owner for side in sides)
