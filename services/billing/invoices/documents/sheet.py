"""An invoice as the words and figures of a page, for HTML and PDF alike. Not pure: protobuf.

It decides no amount and knows no layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType

from chassis.timestamps import time_from_proto
from finemesh.billing.v1 import credit_note_pb2, invoice_pb2
from services.billing.invoices.convert import rounding_of
from services.billing.invoices.invoice import Rounding
from services.billing.prices.pricing import in_dollars

CURRENCY = "USD"
# What a unit price is the price of.
PRICED_UNITS = {"tokens": "1M tokens", "minutes": "device minute", "hours": "node hour"}
_WHAT_IS_ROUNDED = MappingProxyType(
    {
        Rounding.TOTAL: (
            "Each line is the exact sum of its usage records, quantity times unit price; a job's lines are its settled"
            " charge. Only the total is rounded, once, half to even, to the cent."
        ),
        Rounding.LINES: (
            "Each line is the exact sum of its usage records, quantity times unit price, rounded once, half to even, to"
            " the cent; a job's line is its settled charge."
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class SheetLine:
    """`detail` is small print under the description."""

    description: str
    detail: str
    quantity: str
    unit_price: str
    amount: str


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """`number` and `issue_date` are empty on an invoice that is not closed, `rounding` where nothing was rounded.

    Amounts are dollars with two decimals or more.
    """

    title: str
    number: str
    status: str
    issue_date: str
    period: str
    account: str
    issuer: tuple[str, ...]
    customer: tuple[str, ...]
    lines: tuple[SheetLine, ...]
    credit_notes: tuple[SheetLine, ...]
    subtotal: str
    credited: str
    rounding: str
    total: str
    price_books: str
    payment: str
    tax_note: str
    recompute: str
    digest: str
    moment: datetime

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Names and values for the head of the page."""
        named = (
            ("Number", self.number or self.status),
            ("Issued", self.issue_date),
            ("Period", self.period),
            ("Account", self.account),
            ("Currency", CURRENCY),
        )
        return tuple((name, value) for name, value in named if value)

    @property
    def sums(self) -> tuple[tuple[str, str], ...]:
        """Names and amounts under the lines, the total last."""
        credited = (("Credit notes", self.credited),) if self.credit_notes else ()
        rounded = (("Rounding to the cent", self.rounding),) if self.rounding else ()
        subtotal = (("Subtotal", self.subtotal),) if credited or rounded else ()
        return (*subtotal, *credited, *rounded, ("Total", self.total))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences under the sums."""
        return tuple(note for note in (self.payment, self.tax_note, self.price_books, self.recompute) if note)


def sheet_of(invoice: invoice_pb2.Invoice) -> Sheet:
    start = time_from_proto(invoice.period_start_time)
    end = time_from_proto(invoice.period_end_time)
    closed = None if invoice.open else time_from_proto(invoice.close_time)
    given_back = given_back_of(invoice)
    notes = tuple(_note(note, each) for note, each in zip(invoice.credit_notes, given_back, strict=True))
    return Sheet(
        title=f"Invoice {invoice.number}" if closed else f"Invoice of {start:%Y-%m}, open, not final",
        number=invoice.number,
        status="" if closed else "open, not final",
        issue_date=f"{closed:%Y-%m-%d}" if closed else "",
        period=f"{start:%Y-%m-%d} to {end - timedelta(days=1):%Y-%m-%d} (UTC)",
        account=invoice.name.rpartition("/invoices/")[0],
        issuer=_party(invoice.issuer),
        customer=_party(invoice.customer),
        lines=tuple(_line(line) for line in invoice.lines),
        credit_notes=notes,
        subtotal=amount(sum(line.amount_nanos_usd for line in invoice.lines)),
        credited=amount(-sum(given_back)),
        rounding=amount(invoice.rounding_nanos_usd) if invoice.rounding_nanos_usd else "",
        total=amount(invoice.total_nanos_usd),
        price_books=_price_books(invoice.lines),
        payment=_payment(invoice),
        tax_note=invoice.tax_note,
        recompute=(
            f"{_WHAT_IS_ROUNDED[rounding_of(invoice)]} The records can be exported (finemesh billing export-usage"
            f" --month {start:%Y-%m}) and the whole ledger checked (finemesh billing verify)."
        ),
        digest=invoice.sha256,
        moment=closed or start,
    )


def amount(nanos_usd: int) -> str:
    """`1,234.50`, `0.0049`: every digit that counts, because rounding is not done here."""
    whole, _, digits = in_dollars(abs(nanos_usd)).partition(".")
    return f"{'-' if nanos_usd < 0 else ''}{int(whole):,}.{digits}"


def given_back_of(invoice: invoice_pb2.Invoice) -> list[int]:
    """What each credit note takes from the total, in nano-dollars."""
    return [rounding_of(invoice).amount(note.amount_nanos_usd) for note in invoice.credit_notes]


def _line(line: invoice_pb2.InvoiceLine) -> SheetLine:
    records = f"{line.usage_record_count:,} usage record{'' if line.usage_record_count == 1 else 's'}"
    project = f"projects/{line.project_id}"
    whose = line.resource if line.resource.startswith(project) else f"{project} · {line.resource}"
    detail = (whose if line.project_id else line.resource, line.price_book_version, records if line.unit else "")
    unit = PRICED_UNITS.get(line.unit, line.unit)
    return SheetLine(
        description=line.description,
        detail=" · ".join(part for part in detail if part),
        quantity=f"{line.quantity:,} {line.unit}" if line.unit else "",
        unit_price=f"{in_dollars(line.unit_price_nanos_usd)} per {unit}" if line.unit_price_nanos_usd else "",
        amount=amount(line.amount_nanos_usd),
    )


def _note(note: credit_note_pb2.CreditNote, given_back_nanos_usd: int) -> SheetLine:
    corrects = " and ".join(name for name in (note.invoice, note.resource) if name)
    return SheetLine(
        description=f"Credit note {note.number}: {note.reason}",
        detail=f"{time_from_proto(note.create_time):%Y-%m-%d}" + (f" · corrects {corrects}" if corrects else ""),
        quantity="",
        unit_price="",
        amount=amount(-given_back_nanos_usd),
    )


def _party(party: invoice_pb2.BillingParty) -> tuple[str, ...]:
    tax_id = f"Tax id {party.tax_id}" if party.tax_id else ""
    return tuple(text for text in (party.legal_name, *party.address_lines, tax_id, party.email) if text)


def _price_books(lines: Sequence[invoice_pb2.InvoiceLine]) -> str:
    versions = sorted({line.price_book_version for line in lines if line.price_book_version})
    return f"Price book{'s' if len(versions) > 1 else ''}: {', '.join(versions)}." if versions else ""


def _payment(invoice: invoice_pb2.Invoice) -> str:
    moment = "now" if invoice.open else "when this invoice was closed"
    if invoice.owed_nanos_usd:
        return (
            f"Taken from prepaid credit, which did not cover {in_dollars(invoice.owed_nanos_usd)} {CURRENCY} of all"
            f" usage {moment}; the next credit pays that first."
        )
    return "Paid from prepaid credit; nothing is due."
