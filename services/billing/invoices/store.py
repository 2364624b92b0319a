"""Invoices, credit notes, profiles and numbers in the database, and the charges that an invoice is made of.

It decides nothing.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import load_queries
from services.billing.invoices.invoice import SERVED, Charge, CreditNote, LineKind
from services.billing.ledger.derived_ids import usage_record_id
from services.billing.prices.pricing import round_to_cent
from services.billing.terms import Party
from services.billing.usage.records import UsageKind

_queries = load_queries(Path(__file__).parent / "queries.sql")

_Key = tuple[str, str, str, str, str, int]


@dataclass(frozen=True, kw_only=True)
class ClosedInvoice:
    """`billing_month` is the first day of the month; `content` is empty in lists."""

    billing_month: date
    number: int
    sha256: bytes
    total_nanos_usd: int
    close_time: datetime
    content: bytes = b""


class InvoiceStore:
    """Invoices, credit notes, profiles, numbers, and the charges that an invoice is made of."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get_invoice(self, organization_id: str, month: date) -> ClosedInvoice | None:
        row = await _queries.get_invoice(self._connection, organization_id=organization_id, billing_month=month)
        return ClosedInvoice(**row) if row is not None else None

    async def list_invoices(self, organization_id: str, *, before: date | None, row_max: int) -> list[ClosedInvoice]:
        """Closed invoices without their content, newest month first."""
        rows = _queries.list_invoices(
            self._connection, organization_id=organization_id, before_month=before, row_max=row_max
        )
        return [ClosedInvoice(**row) async for row in rows]

    async def list_open_months(self, organization_id: str, *, before: date | None, row_max: int) -> list[date]:
        """Months that have charges or credit notes and are not closed, newest first."""
        rows = _queries.list_open_months(
            self._connection, organization_id=organization_id, before_month=before, row_max=row_max
        )
        return [row["billing_month"] async for row in rows]

    async def list_due(self, *, before: date, after: tuple[str, date], row_max: int) -> list[tuple[str, date]]:
        """Organizations and their months before `before` that have charges and are not closed, in sorted order."""
        rows = _queries.list_due(
            self._connection, before_month=before, after_organization=after[0], after_month=after[1], row_max=row_max
        )
        return [(row["organization_id"], row["billing_month"]) async for row in rows]

    async def take_number(self, kind: str) -> int:
        """The next number of an `invoice` or `credit_note`.

        It is taken late in a transaction, because all others wait for it.
        """
        number: int = await _queries.take_number(self._connection, kind=kind)
        return number

    async def insert_invoice(self, organization_id: str, closed: ClosedInvoice) -> None:
        await _queries.insert_invoice(
            self._connection,
            organization_id=organization_id,
            billing_month=closed.billing_month,
            number=closed.number,
            content=closed.content,
            sha256=closed.sha256,
            total_nanos_usd=closed.total_nanos_usd,
            close_time=closed.close_time,
        )

    async def get_given_back(self, organization_id: str, invoice: str) -> int:
        """What credit notes gave back of an invoice so far, in nano-dollars."""
        given: int = await _queries.get_given_back(self._connection, organization_id=organization_id, invoice=invoice)
        return given

    async def get_credit_note(self, organization_id: str, request_id: str) -> CreditNote | None:
        row = await _queries.get_credit_note(self._connection, organization_id=organization_id, request_id=request_id)
        return CreditNote(**row) if row is not None else None

    async def insert_credit_note(self, note: CreditNote) -> None:
        await _queries.insert_credit_note(
            self._connection,
            organization_id=note.organization_id,
            request_id=note.request_id,
            number=note.number,
            amount_nanos_usd=note.amount_nanos_usd,
            reason=note.reason,
            resource=note.resource,
            invoice=note.invoice,
            transaction_id=note.transaction_id,
            billing_month=note.billing_month,
            create_time=note.create_time,
        )

    async def list_credit_notes(self, organization_id: str, *, before: int | None, row_max: int) -> list[CreditNote]:
        """Newest first, after the note with the number `before`."""
        return await _notes(
            _queries.list_credit_notes(
                self._connection, organization_id=organization_id, before_number=before, row_max=row_max
            )
        )

    async def list_month_notes(self, organization_id: str, month: date, *, row_max: int) -> list[CreditNote]:
        """In the order of their numbers."""
        return await _notes(
            _queries.list_month_notes(
                self._connection, organization_id=organization_id, billing_month=month, row_max=row_max
            )
        )

    async def get_profile(self, organization_id: str) -> Party:
        row = await _queries.get_profile(self._connection, organization_id=organization_id)
        return Party(**{**row, "address_lines": tuple(row["address_lines"])}) if row is not None else Party()

    async def save_profile(self, organization_id: str, profile: Party, now: datetime) -> None:
        await _queries.save_profile(
            self._connection,
            organization_id=organization_id,
            legal_name=profile.legal_name,
            address_lines=list(profile.address_lines),
            tax_id=profile.tax_id,
            email=profile.email,
            update_time=now,
        )

    async def list_charges(self, organization_id: str, month: date, *, row_max: int) -> list[Charge]:
        """The charges of a month without the names of their records, at most `row_max` of each source."""
        scope = {"organization_id": organization_id, "billing_month": month, "row_max": row_max}
        tuning = [
            Charge(kind=LineKind.TUNING, usage_kind="", **row)
            async for row in _queries.list_tuning_charges(self._connection, **scope)
        ]
        served = [
            Charge(kind=SERVED[UsageKind(row["usage_kind"])], **row)
            async for row in _queries.list_served_charges(self._connection, **scope)
        ]
        return tuning + served

    async def get_totals(self, organization_id: str, months: Sequence[date]) -> dict[date, int]:
        """What the invoices of these months would come to: nano-dollars by month, rounded to the cent as they are."""
        rows = _queries.list_sums(self._connection, organization_id=organization_id, billing_months=months)
        found = {row["billing_month"]: round_to_cent(row["sum_nanos_usd"]) async for row in rows}
        return {month: found.get(month, 0) for month in months}

    async def with_names(
        self,
        organization_id: str,
        month: date,
        charges: Sequence[Charge],
        *,
        name_max: int,
        scan_max: int,
    ) -> list[Charge]:
        """The charges with the names of up to `name_max` records each.

        At most `scan_max` records of what was served are looked at, from each day on. A line whose records come after
        very many others of their day is left without names, and still has their number.
        """
        scope = {"organization_id": organization_id, "billing_month": month, "name_max": name_max}
        jobs: dict[str, list[str]] = defaultdict(list)
        if any(charge.kind is LineKind.TUNING for charge in charges):
            async for row in _queries.list_tuning_names(self._connection, **scope):
                jobs[row["resource"]].append(_name(row["project_id"], row["work_key"]))
        lines: dict[_Key, list[str]] = defaultdict(list)
        if any(charge.kind is not LineKind.TUNING for charge in charges):
            async for row in _queries.list_served_names(self._connection, **scope, scan_max=scan_max):
                key = (
                    row["project_id"],
                    row["resource"],
                    row["model"],
                    row["usage_kind"],
                    row["price_book_version"],
                    row["unit_price_nanos_usd"],
                )
                lines[key].append(_name(row["project_id"], row["work_key"]))
        return [replace(charge, usage_records=tuple(_names_of(charge, jobs, lines))) for charge in charges]


async def _notes(rows: AsyncIterator[Any]) -> list[CreditNote]:
    return [CreditNote(**row) async for row in rows]


def _names_of(charge: Charge, jobs: Mapping[str, list[str]], lines: Mapping[_Key, list[str]]) -> Sequence[str]:
    return jobs.get(charge.resource, ()) if charge.kind is LineKind.TUNING else lines.get(charge.key, ())


def _name(project_id: str, work_key: str) -> str:
    return f"projects/{project_id}/usageRecords/{usage_record_id(project_id, work_key)}"
