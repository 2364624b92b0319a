"""Invoices, credit notes and parties as messages, and the bytes of a closed invoice. It decides nothing."""

from chassis.names import format_name
from chassis.timestamps import time_to_proto
from finemesh.billing.v1 import credit_note_pb2, invoice_pb2
from finemesh.events.v1 import billing_events_pb2
from services.billing.calendar import Month
from services.billing.convert import money_to_proto
from services.billing.invoices.invoice import CreditNote, Invoice, Line, Rounding, credit_note_number, invoice_number
from services.billing.invoices.store import ClosedInvoice
from services.billing.terms import Party


def invoice_to_proto(invoice: Invoice) -> invoice_pb2.Invoice:
    return invoice_pb2.Invoice(
        name=invoice_name(invoice.organization_id, invoice.month),
        period_start_time=time_to_proto(invoice.month.start),
        period_end_time=time_to_proto(invoice.month.end),
        lines=[_line_to_proto(line) for line in invoice.lines],
        total_nanos_usd=invoice.total_nanos_usd,
        total=money_to_proto(invoice.total_nanos_usd),
        open=invoice.open,
        number=invoice_number(invoice.number) if invoice.number else "",
        close_time=time_to_proto(invoice.close_time) if invoice.close_time else None,
        issuer=party_to_proto(invoice.issuer),
        customer=party_to_proto(invoice.customer),
        credit_notes=[credit_note_to_proto(note) for note in invoice.credit_notes],
        tax_note=invoice.tax_note,
        owed_nanos_usd=invoice.owed_nanos_usd,
        rounding=(
            invoice_pb2.INVOICE_ROUNDING_TOTAL
            if invoice.rounding is Rounding.TOTAL
            else invoice_pb2.INVOICE_ROUNDING_UNSPECIFIED
        ),
        rounding_nanos_usd=invoice.rounding_nanos_usd,
    )


def rounding_of(invoice: invoice_pb2.Invoice) -> Rounding:
    return Rounding.TOTAL if invoice.rounding else Rounding.LINES


def encode(invoice: Invoice) -> bytes:
    """What is stored of a closed invoice, and what its digest is of."""
    return invoice_to_proto(invoice).SerializeToString(deterministic=True)


def closed_invoice_to_proto(closed: ClosedInvoice) -> invoice_pb2.Invoice:
    invoice = invoice_pb2.Invoice.FromString(closed.content)
    invoice.sha256 = closed.sha256.hex()
    return invoice


def closed_head_to_proto(organization_id: str, closed: ClosedInvoice) -> invoice_pb2.Invoice:
    """A closed invoice without its lines, for lists."""
    month = Month.from_day(closed.billing_month)
    return invoice_pb2.Invoice(
        name=invoice_name(organization_id, month),
        period_start_time=time_to_proto(month.start),
        period_end_time=time_to_proto(month.end),
        total_nanos_usd=closed.total_nanos_usd,
        total=money_to_proto(closed.total_nanos_usd),
        number=invoice_number(closed.number),
        close_time=time_to_proto(closed.close_time),
        sha256=closed.sha256.hex(),
    )


def open_head_to_proto(
    organization_id: str, month: Month, *, total_nanos_usd: int, owed_nanos_usd: int
) -> invoice_pb2.Invoice:
    """An open invoice without its lines, for lists."""
    return invoice_pb2.Invoice(
        name=invoice_name(organization_id, month),
        period_start_time=time_to_proto(month.start),
        period_end_time=time_to_proto(month.end),
        total_nanos_usd=total_nanos_usd,
        total=money_to_proto(total_nanos_usd),
        open=True,
        owed_nanos_usd=owed_nanos_usd,
    )


def invoice_closed_to_proto(organization_id: str, closed: ClosedInvoice) -> billing_events_pb2.InvoiceClosed:
    return billing_events_pb2.InvoiceClosed(
        invoice=invoice_name(organization_id, Month.from_day(closed.billing_month)),
        organization_id=organization_id,
        number=invoice_number(closed.number),
        total_nanos_usd=closed.total_nanos_usd,
        event_time=time_to_proto(closed.close_time),
    )


def credit_note_to_proto(note: CreditNote) -> credit_note_pb2.CreditNote:
    return credit_note_pb2.CreditNote(
        number=credit_note_number(note.number),
        organization=f"organizations/{note.organization_id}",
        amount_nanos_usd=note.amount_nanos_usd,
        reason=note.reason,
        resource=note.resource,
        invoice=note.invoice,
        create_time=time_to_proto(note.create_time),
        transaction_id=str(note.transaction_id),
        billing_month=f"{note.billing_month:%Y-%m}",
    )


def party_to_proto(party: Party) -> invoice_pb2.BillingParty:
    return invoice_pb2.BillingParty(
        legal_name=party.legal_name, address_lines=party.address_lines, tax_id=party.tax_id, email=party.email
    )


def party_from_proto(message: invoice_pb2.BillingParty) -> Party:
    return Party(
        legal_name=message.legal_name,
        address_lines=tuple(message.address_lines),
        tax_id=message.tax_id,
        email=message.email,
    )


def invoice_name(organization_id: str, month: Month) -> str:
    return format_name(invoice_pb2.Invoice, organization=organization_id, invoice=str(month))


def _line_to_proto(line: Line) -> invoice_pb2.InvoiceLine:
    charge = line.charge
    return invoice_pb2.InvoiceLine(
        description=line.description,
        resource=charge.resource,
        kind=charge.kind,
        quantity=charge.quantity,
        unit=line.unit,
        unit_price_nanos_usd=charge.unit_price_nanos_usd,
        amount_nanos_usd=line.amount_nanos_usd,
        price_book_version=charge.price_book_version,
        usage_records=charge.usage_records,
        usage_record_count=charge.usage_record_count,
        minimum_applied=charge.minimum_applied,
        project_id=charge.project_id,
        model=charge.model,
        exact_nanos_usd=charge.amount_nanos_usd,
        usage_kind=charge.usage_kind,
    )
