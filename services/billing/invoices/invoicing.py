"""Drafts invoices, reads them, and closes them into documents that never change. Not pure: database, bus, protobuf.

All but `close_at_once` run in the caller's transaction. Closing takes the lock of the organization's chain, as whoever
books does: what is booked before the close is on the invoice, and what comes after it goes to a later month.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, datetime
from typing import Any

from opentelemetry import metrics

from chassis.bus.outbox import Outbox
from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import FailedPrecondition, ResourceExhausted
from finemesh.billing.v1 import invoice_pb2
from services.billing.calendar import Month
from services.billing.invoices.convert import (
    closed_head_to_proto,
    closed_invoice_to_proto,
    encode,
    invoice_closed_to_proto,
    invoice_to_proto,
    open_head_to_proto,
)
from services.billing.invoices.invoice import Invoice, build_lines
from services.billing.invoices.store import ClosedInvoice, InvoiceStore
from services.billing.ledger.store import LedgerStore
from services.billing.terms import InvoiceTerms

_closed = metrics.get_meter(__name__).create_counter("billing.invoices_closed", unit="{invoice}")


async def read(connection: Connection, terms: InvoiceTerms, organization_id: str, month: Month) -> invoice_pb2.Invoice:
    """The closed invoice as it was stored, or the open one as it stands."""
    closed = await InvoiceStore(connection).get_invoice(organization_id, month.first_day)
    if closed is not None:
        return closed_invoice_to_proto(closed)
    drafted = await draft(connection, terms, organization_id=organization_id, month=month)
    return invoice_to_proto(drafted)


async def list_heads(
    connection: Connection, organization_id: str, *, before: date | None, running: Month, row_max: int
) -> list[invoice_pb2.Invoice]:
    """Invoices without their lines, newest first, before the month `before`; the running month is always one.

    An open one is summed and not drafted: it has a total even when it has more lines than an invoice may have.
    """
    invoices = InvoiceStore(connection)
    closed = await invoices.list_invoices(organization_id, before=before, row_max=row_max)
    heads = {found.billing_month: closed_head_to_proto(organization_id, found) for found in closed}
    open_months = await invoices.list_open_months(organization_id, before=before, row_max=row_max)
    if before is None or running.first_day < before:
        open_months = sorted({running.first_day, *open_months} - heads.keys(), reverse=True)
    listed = sorted({*heads, *open_months}, reverse=True)[:row_max]
    totals = await invoices.get_totals(organization_id, [day for day in listed if day not in heads])
    owed_nanos_usd = (await LedgerStore(connection).get_balances(organization_id)).owed_nanos_usd
    for day, total_nanos_usd in totals.items():
        heads[day] = open_head_to_proto(
            organization_id,
            Month.from_day(day),
            total_nanos_usd=total_nanos_usd,
            owed_nanos_usd=owed_nanos_usd,
        )
    return [heads[day] for day in listed]


async def draft(connection: Connection, terms: InvoiceTerms, *, organization_id: str, month: Month) -> Invoice:
    """The invoice of a month as it would be closed now."""
    invoices = InvoiceStore(connection)
    day = month.first_day
    charges = await invoices.list_charges(organization_id, day, row_max=terms.lines_max + 1)
    notes = await invoices.list_month_notes(organization_id, day, row_max=terms.lines_max + 1)
    _refuse_more_than(terms.lines_max, charges, notes)
    if charges:
        charges = await invoices.with_names(
            organization_id,
            day,
            charges,
            name_max=min(terms.names_per_line_max, terms.names_max // len(charges)),
            scan_max=terms.names_scan_max,
        )
    lines = build_lines(charges)
    _refuse_more_than(terms.lines_max, lines, notes)
    return Invoice(
        organization_id=organization_id,
        month=month,
        lines=lines,
        credit_notes=tuple(notes),
        issuer=terms.issuer,
        customer=await invoices.get_profile(organization_id),
        tax_note=terms.tax_note,
        owed_nanos_usd=(await LedgerStore(connection).get_balances(organization_id)).owed_nanos_usd,
    )


async def close(
    connection: Connection, outbox: Outbox, terms: InvoiceTerms, *, organization_id: str, month: Month, now: datetime
) -> ClosedInvoice:
    """Closes the invoice of a month that is over, once: the same month gets the same invoice again."""
    invoices = InvoiceStore(connection)
    await LedgerStore(connection).lock([organization_id])
    before = await invoices.get_invoice(organization_id, month.first_day)
    if before is not None:
        return before
    if now < month.end + terms.settling:
        raise FailedPrecondition(
            "STATE_CONFLICT",
            f"{month} is not over: its invoice can be closed from {month.end + terms.settling:%Y-%m-%d %H:%M} UTC on",
        )
    drafted = await draft(connection, terms, organization_id=organization_id, month=month)
    if drafted.empty:
        raise FailedPrecondition(
            "STATE_CONFLICT", f"organizations/{organization_id} has no charges in {month}, so there is nothing to close"
        )
    number = await invoices.take_number("invoice")
    content = encode(replace(drafted, number=number, close_time=now))
    closed = ClosedInvoice(
        billing_month=month.first_day,
        number=number,
        content=content,
        sha256=hashlib.sha256(content).digest(),
        total_nanos_usd=drafted.total_nanos_usd,
        close_time=now,
    )
    await invoices.insert_invoice(organization_id, closed)
    event = invoice_closed_to_proto(organization_id, closed)
    await outbox.add(connection, event, subject_name=event.invoice, key=event.invoice)
    _closed.add(1)
    return closed


async def close_at_once(
    pool: Pool, outbox: Outbox, terms: InvoiceTerms, *, organization_id: str, month: Month, now: datetime
) -> ClosedInvoice:
    """Closes it in a transaction of its own, and sends its event on."""
    async with transaction(pool) as connection:
        closed = await close(connection, outbox, terms, organization_id=organization_id, month=month, now=now)
    outbox.wake()
    return closed


def _refuse_more_than(lines_max: int, *sources: Sequence[Any]) -> None:
    if sum(len(source) for source in sources) > lines_max:
        raise ResourceExhausted(
            "SIZE_LIMIT",
            f"the invoice has more than {lines_max} lines: ask the operator to raise invoice_lines_max",
            metadata={"limit": "invoice_lines_max", "limit_lines": str(lines_max)},
        )
