"""Recomputes the digests of closed invoices, and credit notes from their requests.

It takes rows and returns the first difference. It reads no message and no table.
"""

import hashlib
import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import date, datetime
from typing import Any, NamedTuple

from services.billing.audit.difference import Difference, difference, first_unequal
from services.billing.audit.usage_audit import wrong_month
from services.billing.invoices.invoice import credit_note_number, invoice_number
from services.billing.ledger.entries import credit_note

INVOICES = "invoices"
CREDIT_NOTES = "credit notes"


class InvoiceRow(NamedTuple):
    """A closed invoice as it is stored."""

    organization_id: str
    billing_month: date
    number: int
    content: bytes
    sha256: bytes
    total_nanos_usd: int
    close_time: datetime

    @property
    def name(self) -> str:
        return f"organizations/{self.organization_id}/invoices/{self.billing_month:%Y-%m}"

    @property
    def location(self) -> str:
        return f"{self.name} ({invoice_number(self.number)})"


class CreditNoteRow(NamedTuple):
    """A credit note and its entry, as they are stored; of the one that is missing everything is None."""

    organization_id: str
    number: int | None
    request_id: str | None
    amount_nanos_usd: int | None
    resource: str | None
    invoice: str | None
    transaction_id: uuid.UUID | None
    billing_month: date | None
    create_time: datetime | None
    entry_id: uuid.UUID | None
    position: int | None
    entry_resource: str | None
    transaction_time: datetime | None
    revenue_nanos_usd: int | None


def wrong_digest(row: InvoiceRow) -> Difference | None:
    computed = hashlib.sha256(row.content).digest()
    return difference(INVOICES, row.location, computed, row.sha256) if computed != row.sha256 else None


def wrong_values(row: InvoiceRow, where: str, pairs: Sequence[tuple[str, Any, Any]]) -> Difference | None:
    """The first of (name, recomputed, stored) that is not equal."""
    unequal = first_unequal(pairs)
    return difference(INVOICES, f"{row.location}{where}", *unequal) if unequal is not None else None


class CreditNotesAudit:
    """Takes all closed invoices, then all credit notes; `closed` are the closed months of each organization."""

    def __init__(self, closed: Mapping[str, Collection[date]]) -> None:
        self._closed = closed
        self._left: dict[tuple[str, str], int] = {}

    def invoice(self, row: InvoiceRow) -> None:
        self._left[row.organization_id, row.name] = row.total_nanos_usd

    def note(self, row: CreditNoteRow) -> Difference | None:
        different = wrong_credit_note(row, self._closed.get(row.organization_id, ()))
        if different is not None or not row.invoice:
            return different
        where = f"organizations/{row.organization_id} {credit_note_number(row.number or 0)}"
        left, amount = self._left.get((row.organization_id, row.invoice)), row.amount_nanos_usd or 0
        if left is None:
            return difference(CREDIT_NOTES, where, "a closed invoice of the organization", row.invoice)
        if amount > left:
            return difference(CREDIT_NOTES, where, f"at most {left} that are left of {row.invoice}", amount)
        self._left[row.organization_id, row.invoice] = left - amount
        return None


def wrong_credit_note(row: CreditNoteRow, closed: Collection[date]) -> Difference | None:
    where = f"organizations/{row.organization_id}"
    if row.number is None or row.create_time is None:
        return difference(CREDIT_NOTES, f"{where} transaction {row.position}", "a credit note", None)
    where = f"{where} {credit_note_number(row.number)}"
    if row.entry_id is None:
        return difference(CREDIT_NOTES, where, f"transaction {row.transaction_id}", None)
    expected = credit_note(
        organization_id=row.organization_id,
        request_id=row.request_id or "",
        amount_nanos_usd=row.amount_nanos_usd or 0,
        resource=row.resource or "",
        now=row.create_time,
    )
    pairs: tuple[tuple[str, Any, Any], ...] = (
        ("amount", -(row.revenue_nanos_usd or 0), row.amount_nanos_usd),
        ("resource", expected.resource, row.entry_resource),
        ("time", expected.transaction_time, row.transaction_time),
        ("id", expected.id, row.entry_id),
    )
    unequal = first_unequal(pairs)
    if unequal is not None:
        return difference(CREDIT_NOTES, where, *unequal)
    if row.billing_month is None:
        return difference(CREDIT_NOTES, where, "a billing month", None)
    month = wrong_month(row.create_time, row.billing_month, closed)
    return difference(CREDIT_NOTES, where, *month) if month is not None else None
