"""Jobs recomputed: the quote from its numbers and its book, the charge from the usage records and the ending, the
entries from both. Pure: rows in, the first difference out.
"""

import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import date, datetime
from typing import NamedTuple

from services.billing import ledger, settlement
from services.billing.audit import Difference, difference
from services.billing.audit_usage import UsageRow, wrong_month
from services.billing.ledger import Account, Balances, HoldState, Transaction
from services.billing.periods import first_of_month
from services.billing.pricebook import PriceBook
from services.billing.pricing import Metered, PriceUnknown, Work, quote, record_amount
from services.billing.records import UsageKind
from services.billing.settlement import Ending

HOLDS = "holds"
_TOKENS_OF = {UsageKind.TRAINING_TOKENS: "training_tokens", UsageKind.EVALUATION_TOKENS: "validation_tokens"}


class HoldRow(NamedTuple):
    """A hold as it is stored, with what is stored of the job's ending."""

    resource: str
    id: str
    organization_id: str
    project_id: str
    state: str
    base_model: str
    method: str
    training_tokens: int
    validation_tokens: int
    epochs: int
    evaluations: int
    parameter_count: int
    price_book_version: str
    held_nanos_usd: int
    charged_nanos_usd: int
    minimum_applied: bool
    billed_tokens: int
    adjustment_nanos_usd: int
    discrepancy: str
    hold_time: datetime
    end_time: datetime | None
    billing_month: date | None
    api_key_id: str
    ending: str | None
    usage_record_count: int | None
    ending_time: datetime | None

    @property
    def location(self) -> str:
        return f"organizations/{self.organization_id} hold of {self.resource}"

    @property
    def work(self) -> Work:
        return Work(
            base_model=self.base_model,
            method=self.method,
            training_tokens=self.training_tokens,
            validation_tokens=self.validation_tokens,
            epochs=self.epochs,
            evaluations=self.evaluations,
            parameter_count=self.parameter_count,
        )


class JobEntryRow(NamedTuple):
    """A ledger transaction of a job."""

    resource: str
    organization_id: str
    position: int
    id: uuid.UUID
    kind: str
    price_book_version: str
    transaction_time: datetime
    accounts: Sequence[str]
    amounts: Sequence[int]

    @property
    def location(self) -> str:
        return f"organizations/{self.organization_id} transaction {self.position}"


class JobsAudit:
    """`open_held` sums what the open holds of each organization hold."""

    def __init__(self, books: Mapping[str, PriceBook], closed: Mapping[str, Collection[date]]) -> None:
        self._books = books
        self._closed = closed
        self.open_held: dict[str, int] = {}

    def job(self, hold: HoldRow, records: Sequence[UsageRow], entries: Sequence[JobEntryRow]) -> Difference | None:
        """A hold with all usage records and all ledger transactions of its job, these in their order."""
        book = self._books.get(hold.price_book_version)
        if book is None:
            return _of(hold, "a price book that is stored", hold.price_book_version)
        try:
            rate = book.tuning_rate(hold.base_model, hold.method, hold.parameter_count)
        except PriceUnknown as error:
            return _of(hold, "a model and a method with a price", str(error))
        quoted = quote(book.tuning_rule, rate, hold.work).total_nanos_usd
        if hold.held_nanos_usd != quoted:
            return _of(hold, f"held {quoted}", f"held {hold.held_nanos_usd}")
        if hold.id != ledger.hold_id(hold.resource):
            return _of(hold, f"id {ledger.hold_id(hold.resource)}", f"id {hold.id}")
        before: UsageRow | None = None
        for record in records:
            different = _wrong_record(record, before, hold, book, rate)
            if different is not None:
                return different
            before = record
        different = self._wrong_end(hold, records, book, rate)
        if different is not None:
            return different
        if hold.state == HoldState.HELD:
            self.open_held[hold.organization_id] = self.open_held.get(hold.organization_id, 0) + hold.held_nanos_usd
        return _wrong_entries(hold, entries)

    def finish(self, balances: Mapping[str, Mapping[str, int]]) -> Difference | None:
        """After the last hold: what is on the held accounts is what the open holds hold."""
        for organization_id in sorted({*balances, *self.open_held}):
            wanted = self.open_held.get(organization_id, 0)
            found = balances.get(organization_id, {}).get(Account.HELD)
            if wanted != (found or 0):
                where = f"organizations/{organization_id} account {Account.HELD}"
                return difference(HOLDS, where, f"{wanted} in open holds", found)
        return None

    def stray_record(self, record: UsageRow) -> Difference:
        return difference(HOLDS, record.location, f"a hold of {record.resource}", None)

    def stray_entry(self, entry: JobEntryRow) -> Difference:
        return difference(HOLDS, entry.location, f"a hold of {entry.resource}", None)

    def _wrong_end(self, hold: HoldRow, records: Sequence[UsageRow], book: PriceBook, rate: int) -> Difference | None:
        ending = Ending(hold.ending) if hold.ending in set(Ending) else None
        if hold.state != HoldState.SETTLED:
            if hold.charged_nanos_usd:
                return _of(hold, f"charged 0 because it is {hold.state}", f"charged {hold.charged_nanos_usd}")
            complete = ending is not None and (
                not settlement.needs_all_usage(ending) or len(records) >= (hold.usage_record_count or 0)
            )
            if hold.state == HoldState.HELD and complete:
                return _of(hold, f"settled: it ended as {ending} and its usage is complete", "held")
            return None
        if ending is None:
            return _of(hold, "the ending that settled it", hold.ending)
        if hold.end_time != hold.ending_time:
            return _of(hold, f"end time {hold.ending_time}", f"end time {hold.end_time}")
        decided = settlement.settle(
            ending=ending,
            held_nanos_usd=hold.held_nanos_usd,
            rule=book.tuning_rule,
            nanos_usd_per_million=rate,
            work=hold.work,
            metered=Metered(
                training_tokens=_tokens(records, UsageKind.TRAINING_TOKENS),
                validation_tokens=_tokens(records, UsageKind.EVALUATION_TOKENS),
            ),
        )
        worth = sum(record.amount_nanos_usd for record in records)
        pairs = (
            ("charged", decided.charge_nanos_usd, hold.charged_nanos_usd),
            ("minimum applied", decided.price.minimum_applied, hold.minimum_applied),
            ("billed tokens", decided.price.tokens, hold.billed_tokens),
            ("adjustment", decided.charge_nanos_usd - worth, hold.adjustment_nanos_usd),
        )
        for name, wanted, found in pairs:
            if wanted != found:
                return _of(hold, f"{name} {wanted}", f"{name} {found}")
        announced = hold.usage_record_count or 0
        # Only a hold that expired is settled without all its records, and that is written down.
        if len(records) > announced or (
            settlement.needs_all_usage(ending) and len(records) < announced and not hold.discrepancy
        ):
            return _of(hold, f"{announced} usage records", f"{len(records)} usage records")
        if decided.discrepancy and decided.discrepancy not in hold.discrepancy:
            return _of(hold, f"discrepancy: {decided.discrepancy}", f"discrepancy: {hold.discrepancy}")
        assert hold.end_time is not None
        if hold.billing_month is None:
            return _of(hold, "a billing month", None)
        month = wrong_month(hold.end_time, hold.billing_month, self._closed.get(hold.organization_id, ()))
        return _of(hold, *month) if month is not None else None


def _wrong_record(
    record: UsageRow, before: UsageRow | None, hold: HoldRow, book: PriceBook, rate: int
) -> Difference | None:
    amount = record_amount(book.tuning_rule, rate, hold.work, _TOKENS_OF[UsageKind(record.kind)], record.quantity)
    pairs = (
        ("organization", hold.organization_id, record.organization_id),
        ("project", hold.project_id, record.project_id),
        ("model", hold.base_model, record.model),
        ("price book", hold.price_book_version, record.price_book_version),
        ("unit price", rate, record.unit_price_nanos_usd),
        ("amount", amount, record.amount_nanos_usd),
        ("billing month", first_of_month(record.usage_time), record.billing_month),
        ("entry", None, record.transaction_id),
    )
    for name, wanted, found in pairs:
        if wanted != found:
            return difference(HOLDS, record.location, f"{name} {wanted}", f"{name} {found}")
    if before is None or not record.kind == before.kind == UsageKind.TRAINING_TOKENS:
        return None
    if record.start_step < before.end_step:
        return difference(
            HOLDS, record.location, f"steps from {before.end_step} on", f"steps from {record.start_step} on"
        )
    return None


def _wrong_entries(hold: HoldRow, entries: Sequence[JobEntryRow]) -> Difference | None:
    expected = _expected_entries(hold)
    for wanted, found in zip(expected, entries, strict=False):
        moved = ", ".join(f"{each.account} {each.amount_nanos_usd}" for each in wanted.postings)
        pairs = (
            ("kind", wanted.kind.value, found.kind),
            ("postings", moved, ", ".join(f"{a} {n}" for a, n in zip(found.accounts, found.amounts, strict=True))),
            ("organization", wanted.organization_id, found.organization_id),
            ("price book", wanted.price_book_version, found.price_book_version),
            ("time", wanted.transaction_time.isoformat(), found.transaction_time.isoformat()),
            ("id", str(wanted.id), str(found.id)),
        )
        for name, right, stored in pairs:
            if right != stored:
                return difference(HOLDS, found.location, f"{name} {right}", f"{name} {stored}")
    if len(entries) > len(expected):
        extra = entries[len(expected)]
        return difference(HOLDS, extra.location, f"no such entry: the hold is {hold.state}", extra.kind)
    if len(entries) < len(expected):
        return _of(hold, f"a transaction {expected[len(entries)].kind}", None)
    return None


def _expected_entries(hold: HoldRow) -> list[Transaction]:
    amount = hold.held_nanos_usd
    of = {"organization_id": hold.organization_id, "resource": hold.resource}
    begun = ledger.hold(
        Balances(prepaid_nanos_usd=amount),
        amount_nanos_usd=amount,
        price_book_version=hold.price_book_version,
        now=hold.hold_time,
        **of,
    )
    ended: Transaction | None = None
    if hold.state == HoldState.SETTLED and hold.end_time is not None:
        ended = ledger.settle(
            held_nanos_usd=amount,
            charge_nanos_usd=hold.charged_nanos_usd,
            price_book_version=hold.price_book_version,
            end_time=hold.end_time,
            **of,
        )
    elif hold.state != HoldState.HELD and hold.end_time is not None:
        ended = ledger.release(
            held_nanos_usd=amount, price_book_version=hold.price_book_version, now=hold.end_time, **of
        )
    return [entry for entry in (begun, ended) if entry is not None]


def _tokens(records: Sequence[UsageRow], kind: UsageKind) -> int:
    return sum(record.quantity for record in records if record.kind == kind)


def _of(hold: HoldRow, expected: object, found: object) -> Difference:
    return difference(HOLDS, hold.location, expected, found)
