"""Recomputes usage: the price and the amount of each record, and each served entry from its records.

It takes rows and returns the first difference.
"""

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import date, datetime
from typing import NamedTuple

from services.billing.audit.difference import Difference, difference, first_unequal
from services.billing.calendar import first_of_month
from services.billing.ledger.entries import TransactionKind, usage_charge
from services.billing.prices.pricebook import PriceBook
from services.billing.prices.pricing import PriceUnknown, token_amount
from services.billing.usage.records import UsageKind
from services.billing.usage.work_keys import COLLECTIONS, SIDES, rented_number, served_tokens

USAGE = "usage"
PRICE_BOOKS = "price books"

# What the entry that posts a record is, by the record's kind.
ENTRY_OF: Mapping[str, TransactionKind] = {
    UsageKind.INPUT_TOKENS: TransactionKind.INFERENCE,
    UsageKind.OUTPUT_TOKENS: TransactionKind.INFERENCE,
    UsageKind.ENDPOINT_MINUTES: TransactionKind.ENDPOINT,
    UsageKind.CLUSTER_HOURS: TransactionKind.CLUSTER,
}


class UsageRow(NamedTuple):
    """A usage record as it is stored."""

    project_id: str
    work_key: str
    kind: str
    organization_id: str
    resource: str
    model: str
    quantity: int
    unit_price_nanos_usd: int
    amount_nanos_usd: int
    price_book_version: str
    start_step: int
    end_step: int
    usage_time: datetime
    api_key_id: str
    billing_month: date
    transaction_id: uuid.UUID | None

    @property
    def location(self) -> str:
        return f"organizations/{self.organization_id} projects/{self.project_id} usage record {self.work_key}"


class ServedRow(NamedTuple):
    """A ledger transaction of served usage, with what it earned."""

    id: uuid.UUID
    organization_id: str
    position: int
    kind: str
    resource: str
    price_book_version: str
    transaction_time: datetime
    revenue_nanos_usd: int | None

    @property
    def location(self) -> str:
        return f"organizations/{self.organization_id} transaction {self.position}"


class UsageAudit:
    """`books` by version; `closed` are the months of each organization whose invoices are closed."""

    def __init__(self, books: Mapping[str, PriceBook], closed: Mapping[str, Collection[date]]) -> None:
        self._books = books
        self._closed = closed
        self._ends = {version: _end(book, books.values()) for version, book in books.items()}
        # The same few prices again and again: finding an entry of a book is the slow part of a record.
        self._prices: dict[tuple[str, str, str], int] = {}

    def record(self, row: UsageRow) -> Difference | None:
        """A served record on its own."""
        book = self._books.get(row.price_book_version)
        if book is None:
            return difference(USAGE, row.location, "a price book that is stored", row.price_book_version)
        price = self._prices.get((row.price_book_version, row.kind, row.model))
        if price is None:
            try:
                price = served_price(book, row.kind, row.model)
            except PriceUnknown as error:
                return difference(USAGE, row.location, "a model or hardware with a price", str(error))
            self._prices[row.price_book_version, row.kind, row.model] = price
        if row.unit_price_nanos_usd != price:
            return difference(USAGE, row.location, f"unit price {price}", f"unit price {row.unit_price_nanos_usd}")
        amount = token_amount(row.quantity, price) if row.kind in SIDES else row.quantity * price
        if row.amount_nanos_usd != amount:
            return difference(USAGE, row.location, f"amount {amount}", f"amount {row.amount_nanos_usd}")
        if row.usage_time < book.effective_from:
            began = book.effective_from.isoformat()
            return difference(USAGE, row.location, f"use from {began} on", f"use at {row.usage_time.isoformat()}")
        end = self._ends[row.price_book_version]
        if end is not None and row.usage_time >= end:
            return difference(
                USAGE, row.location, f"use before {end.isoformat()}", f"use at {row.usage_time.isoformat()}"
            )
        wrong = _wrong_key(row) or wrong_month(
            row.usage_time, row.billing_month, self._closed.get(row.organization_id, ())
        )
        return difference(USAGE, row.location, *wrong) if wrong is not None else None

    def unposted(self, row: UsageRow) -> Difference | None:
        """A served record that names no entry: it may be worth nothing only."""
        if row.amount_nanos_usd:
            return difference(USAGE, row.location, "an entry that posts it", "none")
        return None

    def entry(self, entry: ServedRow, records: Sequence[UsageRow]) -> Difference | None:
        """A served entry and all records that name it."""
        if not records:
            return difference(USAGE, entry.location, f"usage records of {entry.id}", "none")
        first = records[0]
        kind = ENTRY_OF[first.kind]
        shared = _shared(first)
        for row in records:
            if _shared(row) != shared:
                return difference(USAGE, row.location, f"the owner of {first.work_key}", "another one in one entry")
            if ENTRY_OF[row.kind] is not kind:
                return difference(USAGE, row.location, f"a record of {kind}", row.kind)
        expected = usage_charge(
            kind,
            organization_id=first.organization_id,
            project_id=first.project_id,
            resource=first.resource,
            work_keys=sorted({row.work_key.removesuffix(SIDES.get(UsageKind(row.kind), "")) for row in records}),
            amount_nanos_usd=sum(row.amount_nanos_usd for row in records),
            price_book_version=first.price_book_version,
            usage_time=max(row.usage_time for row in records),
        )
        if expected is None:
            return difference(USAGE, entry.location, "no entry for records that are worth nothing", entry.id)
        pairs = (
            ("revenue", expected.postings[-1].amount_nanos_usd, entry.revenue_nanos_usd),
            ("kind", expected.kind, entry.kind),
            ("organization", expected.organization_id, entry.organization_id),
            ("resource", expected.resource, entry.resource),
            ("price book", expected.price_book_version, entry.price_book_version),
            ("time", expected.transaction_time.isoformat(), entry.transaction_time.isoformat()),
            ("id", str(expected.id), str(entry.id)),
        )
        unequal = first_unequal(pairs)
        return difference(USAGE, entry.location, *unequal) if unequal is not None else None

    def lost(self, row: UsageRow) -> Difference:
        """A served record whose entry is not there."""
        return difference(USAGE, row.location, f"transaction {row.transaction_id}", None)


def _end(book: PriceBook, books: Iterable[PriceBook]) -> datetime | None:
    """When a version ended: as it says, or when the next one of its book began, which may have been written later."""
    ends = [other.effective_from for other in books if other.book == book.book]
    if book.effective_until is not None:
        ends.append(book.effective_until)
    return min((end for end in ends if end > book.effective_from), default=None)


def _shared(row: UsageRow) -> tuple[object, ...]:
    """What all records of an entry have in common."""
    month = first_of_month(row.usage_time)
    return (row.organization_id, row.project_id, row.resource, row.price_book_version, row.api_key_id, month)


def _wrong_key(row: UsageRow) -> tuple[str, str] | None:
    """What is expected and found, where the key of a served record cannot be that of its work."""
    kind = UsageKind(row.kind)
    if kind in SIDES:
        side = SIDES[kind]
        part = row.work_key.removesuffix(side)
        right = part not in ("", row.work_key)
        expected = f"a work key that ends in {side}"
        if right and kind is UsageKind.OUTPUT_TOKENS and served_tokens(part) not in (None, row.quantity):
            return f"a work key of {row.quantity} tokens", f"work key {row.work_key}"
    else:
        right = rented_number(kind, row.project_id, row.resource, row.work_key) is not None
        expected = f"a work key of one of the {COLLECTIONS[kind]} of the project, which is {row.resource}"
    if not right:
        return expected, f"work key {row.work_key}"
    if (row.start_step, row.end_step) != (0, 0):
        return "no steps", f"steps {row.start_step} to {row.end_step}"
    return None


def served_price(book: PriceBook, kind: str, model: str) -> int:
    """Of a million tokens, a device minute or a node hour; PriceUnknown where the book has none."""
    if kind == UsageKind.INPUT_TOKENS:
        return book.inference_rate(model).input_nanos_usd_per_million
    if kind == UsageKind.OUTPUT_TOKENS:
        return book.inference_rate(model).output_nanos_usd_per_million
    if kind == UsageKind.ENDPOINT_MINUTES:
        return book.hosting_rate(model).nanos_usd_per_device_minute
    if kind == UsageKind.CLUSTER_HOURS:
        return book.cluster_rate(model).nanos_usd_per_node_hour
    raise PriceUnknown(f"nothing is served as {kind!r}")


def wrong_month(moment: datetime, month: date, closed: Collection[date]) -> tuple[str, str] | None:
    """What is expected and found, where something of this moment cannot be on the invoice of `month`."""
    own = first_of_month(moment)
    if month == own or (own in closed and month > own):
        return None
    later = " or a later month" if own in closed else ""
    return f"billing month {own:%Y-%m}{later}", f"billing month {month:%Y-%m}"
