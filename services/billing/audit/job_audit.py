"""Recomputes jobs: the quote, the charge, and the entries that follow from both.

A quote follows from the job's numbers and its price book, a charge from the usage records and the ending. It takes rows
and returns the first difference.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import date

from services.billing.audit.difference import Difference, difference, first_unequal
from services.billing.audit.hold_audit import HOLDS, HoldRow, JobEntryRow, of_hold, wrong_entries
from services.billing.audit.usage_audit import UsageRow, wrong_month
from services.billing.calendar import first_of_month
from services.billing.holds import settlement
from services.billing.holds.hold import HoldState
from services.billing.holds.settlement import Ending
from services.billing.ledger.derived_ids import hold_id
from services.billing.ledger.entries import Account
from services.billing.prices.pricebook import PriceBook
from services.billing.prices.pricing import Metered, PriceUnknown, quote, record_amount
from services.billing.usage import work_keys
from services.billing.usage.records import RULE_TOKENS, UsageKind


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
            return of_hold(hold, "a price book that is stored", hold.price_book_version)
        try:
            rate = book.work_rate(hold.work)
        except PriceUnknown as error:
            return of_hold(hold, "a model and a method with a price", str(error))
        quoted = quote(book.tuning_rule, rate, hold.work).total_nanos_usd
        if hold.held_nanos_usd != quoted:
            return of_hold(hold, f"held {quoted}", f"held {hold.held_nanos_usd}")
        if hold.id != hold_id(hold.resource):
            return of_hold(hold, f"id {hold_id(hold.resource)}", f"id {hold.id}")
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
        return wrong_entries(hold, entries)

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
        owner = (hold.organization_id, hold.project_id)
        told = (hold.ending_organization_id, hold.ending_project_id)
        if hold.ending is not None and told != owner:
            return of_hold(hold, "an ending of {} in {}".format(*owner), "an ending of {} in {}".format(*told))
        if hold.state != HoldState.SETTLED:
            return _wrong_unsettled(hold, ending, records)
        if ending is None:
            return of_hold(hold, "the ending that settled it", hold.ending)
        if hold.end_time != hold.ending_time:
            return of_hold(hold, f"end time {hold.ending_time}", f"end time {hold.end_time}")
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
        unequal = first_unequal(pairs)
        if unequal is not None:
            return of_hold(hold, *unequal)
        announced = hold.usage_record_count or 0
        # Only a hold that expired is settled without all its records, and that is written down.
        if len(records) > announced or (
            settlement.needs_all_usage(ending) and len(records) < announced and not hold.discrepancy
        ):
            return of_hold(hold, f"{announced} usage records", f"{len(records)} usage records")
        if decided.discrepancy and decided.discrepancy not in hold.discrepancy:
            return of_hold(hold, f"discrepancy: {decided.discrepancy}", f"discrepancy: {hold.discrepancy}")
        assert hold.end_time is not None
        if hold.billing_month is None:
            return of_hold(hold, "a billing month", None)
        month = wrong_month(hold.end_time, hold.billing_month, self._closed.get(hold.organization_id, ()))
        return of_hold(hold, *month) if month is not None else None


def _wrong_unsettled(hold: HoldRow, ending: Ending | None, records: Sequence[UsageRow]) -> Difference | None:
    """A hold that charged nothing: it still waits, or its job never ran, or nobody renewed it."""
    worth = sum(record.amount_nanos_usd for record in records)
    pairs = (
        ("charged", 0, hold.charged_nanos_usd),
        ("minimum applied", False, hold.minimum_applied),
        ("billed tokens", 0, hold.billed_tokens),
        # What an expired job did stays booked, and over the job a report comes to nothing.
        ("adjustment", -worth if hold.state == HoldState.EXPIRED else 0, hold.adjustment_nanos_usd),
        ("discrepancy", "", hold.discrepancy),
        ("billing month", None, hold.billing_month),
        ("ended", hold.state != HoldState.HELD, hold.end_time is not None),
    )
    unequal = first_unequal(pairs)
    if unequal is not None:
        wanted, found = unequal
        return of_hold(hold, f"{wanted} because it is {hold.state}", found)
    if hold.state == HoldState.RELEASED and records:
        return of_hold(hold, "no usage records, because it was released before it ran", f"{len(records)} usage records")
    announced = hold.usage_record_count or 0
    if ending is not None and len(records) > announced:
        return of_hold(hold, f"at most {announced} usage records", f"{len(records)} usage records")
    complete = ending is not None and (not settlement.needs_all_usage(ending) or len(records) == announced)
    if hold.state == HoldState.HELD and complete:
        return of_hold(hold, f"settled: it ended as {ending} and its usage is complete", "held")
    return None


def _wrong_record(
    record: UsageRow, before: UsageRow | None, hold: HoldRow, book: PriceBook, rate: int
) -> Difference | None:
    amount = record_amount(book.tuning_rule, rate, hold.work, RULE_TOKENS[UsageKind(record.kind)], record.quantity)
    pairs = (
        ("organization", hold.organization_id, record.organization_id),
        ("project", hold.project_id, record.project_id),
        ("work key", _work_key(record), record.work_key),
        ("API key", hold.api_key_id, record.api_key_id),
        ("model", hold.base_model, record.model),
        ("price book", hold.price_book_version, record.price_book_version),
        ("unit price", rate, record.unit_price_nanos_usd),
        ("amount", amount, record.amount_nanos_usd),
        ("billing month", first_of_month(record.usage_time), record.billing_month),
        ("entry", None, record.transaction_id),
    )
    unequal = first_unequal(pairs)
    if unequal is not None:
        return difference(HOLDS, record.location, *unequal)
    if before is None or not record.kind == before.kind == UsageKind.TRAINING_TOKENS:
        return None
    if record.start_step < before.end_step:
        return difference(
            HOLDS, record.location, f"steps from {before.end_step} on", f"steps from {record.start_step} on"
        )
    return None


def _work_key(record: UsageRow) -> str:
    job_id = record.resource.rpartition("/")[2]
    return work_keys.of_training(UsageKind(record.kind), job_id, record.start_step, record.end_step)


def _tokens(records: Sequence[UsageRow], kind: UsageKind) -> int:
    return sum(record.quantity for record in records if record.kind == kind)
