"""Tables of documents: invoices, credit notes, profiles and numbers. It decides nothing; what an invoice is made of is
read by `charge_store.py`."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import load_queries
from services.billing.invoice import CreditNote, Party

_queries = load_queries(Path(__file__).parent / "queries_documents.sql")


@dataclass(frozen=True, kw_only=True)
class ClosedInvoice:
    """`billing_month` is the first day of the month; `content` is empty in lists."""

    billing_month: date
    number: int
    sha256: bytes
    total_nanos_usd: int
    close_time: datetime
    content: bytes = b""


async def closed_months(connection: Connection, organization_ids: Sequence[str]) -> dict[str, frozenset[date]]:
    """The first days of the months whose invoices are closed, for each organization that was asked for.

    It stays true for as long as the chains of these organizations are locked.
    """
    found: dict[str, set[date]] = {organization_id: set() for organization_id in organization_ids}
    async for row in _queries.list_closed_months(connection, organization_ids=sorted(found)):
        found[row["organization_id"]].add(row["billing_month"])
    return {organization_id: frozenset(months) for organization_id, months in found.items()}


async def get_invoice(connection: Connection, organization_id: str, month: date) -> ClosedInvoice | None:
    row = await _queries.get_invoice(connection, organization_id=organization_id, billing_month=month)
    return ClosedInvoice(**row) if row is not None else None


async def list_invoices(
    connection: Connection, organization_id: str, *, before: date | None, row_max: int
) -> list[ClosedInvoice]:
    """Closed invoices without their content, newest month first."""
    rows = _queries.list_invoices(connection, organization_id=organization_id, before_month=before, row_max=row_max)
    return [ClosedInvoice(**row) async for row in rows]


async def list_open_months(
    connection: Connection, organization_id: str, *, before: date | None, row_max: int
) -> list[date]:
    """Months that have charges or credit notes and are not closed, newest first."""
    rows = _queries.list_open_months(connection, organization_id=organization_id, before_month=before, row_max=row_max)
    return [row["billing_month"] async for row in rows]


async def list_due(
    connection: Connection, *, before: date, after: tuple[str, date], row_max: int
) -> list[tuple[str, date]]:
    """Organizations and their months before `before` that have charges and are not closed, in sorted order."""
    rows = _queries.list_due(
        connection, before_month=before, after_organization=after[0], after_month=after[1], row_max=row_max
    )
    return [(row["organization_id"], row["billing_month"]) async for row in rows]


async def take_number(connection: Connection, kind: str) -> int:
    """The next number of an `invoice` or `credit_note`: taken late in a transaction, because all others wait for it."""
    number: int = await _queries.take_number(connection, kind=kind)
    return number


async def insert_invoice(connection: Connection, organization_id: str, closed: ClosedInvoice) -> None:
    await _queries.insert_invoice(
        connection,
        organization_id=organization_id,
        billing_month=closed.billing_month,
        number=closed.number,
        content=closed.content,
        sha256=closed.sha256,
        total_nanos_usd=closed.total_nanos_usd,
        close_time=closed.close_time,
    )


async def get_revenue(connection: Connection, organization_id: str) -> int:
    """What was earned from the organization so far, in nano-dollars."""
    return await _queries.get_revenue(connection, organization_id=organization_id) or 0


async def get_given_back(connection: Connection, organization_id: str, invoice: str) -> int:
    """What credit notes gave back of an invoice so far, in nano-dollars."""
    given: int = await _queries.get_given_back(connection, organization_id=organization_id, invoice=invoice)
    return given


async def get_credit_note(connection: Connection, organization_id: str, request_id: str) -> CreditNote | None:
    row = await _queries.get_credit_note(connection, organization_id=organization_id, request_id=request_id)
    return CreditNote(**row) if row is not None else None


async def insert_credit_note(connection: Connection, note: CreditNote) -> None:
    await _queries.insert_credit_note(
        connection,
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


async def list_credit_notes(
    connection: Connection, organization_id: str, *, before: int | None, row_max: int
) -> list[CreditNote]:
    """Newest first, after the note with the number `before`."""
    return await _notes(
        _queries.list_credit_notes(connection, organization_id=organization_id, before_number=before, row_max=row_max)
    )


async def list_month_notes(
    connection: Connection, organization_id: str, month: date, *, row_max: int
) -> list[CreditNote]:
    """In the order of their numbers."""
    return await _notes(
        _queries.list_month_notes(connection, organization_id=organization_id, billing_month=month, row_max=row_max)
    )


async def get_profile(connection: Connection, organization_id: str) -> Party:
    row = await _queries.get_profile(connection, organization_id=organization_id)
    return Party(**{**row, "address_lines": tuple(row["address_lines"])}) if row is not None else Party()


async def save_profile(connection: Connection, organization_id: str, profile: Party, now: datetime) -> None:
    await _queries.save_profile(
        connection,
        organization_id=organization_id,
        legal_name=profile.legal_name,
        address_lines=list(profile.address_lines),
        tax_id=profile.tax_id,
        email=profile.email,
        update_time=now,
    )


async def _notes(rows: AsyncIterator[Any]) -> list[CreditNote]:
    return [CreditNote(**row) async for row in rows]
