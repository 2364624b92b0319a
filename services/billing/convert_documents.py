"""Between the contracts of documents and the domain: invoices, credit notes, parties. It decides nothing."""

from collections.abc import Iterable

from google.type import money_pb2

from chassis.errors import FieldViolation, InvalidArgument
from chassis.names import format_name
from finemesh.billing.v1 import credit_note_pb2, invoice_pb2, invoice_service_pb2
from finemesh.events.v1 import billing_events_pb2
from services.billing.convert import to_timestamp
from services.billing.cost_store import CostRow, Dimension
from services.billing.document_store import ClosedInvoice
from services.billing.invoice import CreditNote, Invoice, Line, Month, Party, credit_note_number, invoice_number
from services.billing.pricing import NANOS_USD_PER_USD

_DIMENSIONS = {
    invoice_service_pb2.COST_DIMENSION_PROJECT: Dimension.PROJECT,
    invoice_service_pb2.COST_DIMENSION_MODEL: Dimension.MODEL,
    invoice_service_pb2.COST_DIMENSION_DAY: Dimension.DAY,
    invoice_service_pb2.COST_DIMENSION_RESOURCE: Dimension.RESOURCE,
    invoice_service_pb2.COST_DIMENSION_API_KEY: Dimension.API_KEY,
    invoice_service_pb2.COST_DIMENSION_KIND: Dimension.KIND,
}


def to_invoice(invoice: Invoice) -> invoice_pb2.Invoice:
    return invoice_pb2.Invoice(
        name=invoice_name(invoice.organization_id, invoice.month),
        period_start_time=to_timestamp(invoice.month.start),
        period_end_time=to_timestamp(invoice.month.end),
        lines=[_to_line(line) for line in invoice.lines],
        total_nanos_usd=invoice.total_nanos_usd,
        total=to_signed_money(invoice.total_nanos_usd),
        open=invoice.open,
        number=invoice_number(invoice.number) if invoice.number else "",
        close_time=to_timestamp(invoice.close_time) if invoice.close_time else None,
        issuer=to_party(invoice.issuer),
        customer=to_party(invoice.customer),
        credit_notes=[to_credit_note(note) for note in invoice.credit_notes],
        tax_note=invoice.tax_note,
        owed_nanos_usd=invoice.owed_nanos_usd,
    )


def encode(invoice: Invoice) -> bytes:
    """What is stored of a closed invoice, and what its digest is of."""
    return to_invoice(invoice).SerializeToString(deterministic=True)


def to_closed_invoice(closed: ClosedInvoice) -> invoice_pb2.Invoice:
    invoice = invoice_pb2.Invoice.FromString(closed.content)
    invoice.sha256 = closed.sha256.hex()
    return invoice


def to_head(organization_id: str, closed: ClosedInvoice) -> invoice_pb2.Invoice:
    """A closed invoice without its lines, for lists."""
    month = Month.from_day(closed.billing_month)
    return invoice_pb2.Invoice(
        name=invoice_name(organization_id, month),
        period_start_time=to_timestamp(month.start),
        period_end_time=to_timestamp(month.end),
        total_nanos_usd=closed.total_nanos_usd,
        total=to_signed_money(closed.total_nanos_usd),
        number=invoice_number(closed.number),
        close_time=to_timestamp(closed.close_time),
        sha256=closed.sha256.hex(),
    )


def to_open_head(
    organization_id: str, month: Month, *, total_nanos_usd: int, owed_nanos_usd: int
) -> invoice_pb2.Invoice:
    """An open invoice without its lines, for lists."""
    return invoice_pb2.Invoice(
        name=invoice_name(organization_id, month),
        period_start_time=to_timestamp(month.start),
        period_end_time=to_timestamp(month.end),
        total_nanos_usd=total_nanos_usd,
        total=to_signed_money(total_nanos_usd),
        open=True,
        owed_nanos_usd=owed_nanos_usd,
    )


def to_closed_event(organization_id: str, closed: ClosedInvoice) -> billing_events_pb2.InvoiceClosed:
    return billing_events_pb2.InvoiceClosed(
        invoice=invoice_name(organization_id, Month.from_day(closed.billing_month)),
        organization_id=organization_id,
        number=invoice_number(closed.number),
        total_nanos_usd=closed.total_nanos_usd,
        event_time=to_timestamp(closed.close_time),
    )


def to_credit_note(note: CreditNote) -> credit_note_pb2.CreditNote:
    return credit_note_pb2.CreditNote(
        number=credit_note_number(note.number),
        organization=f"organizations/{note.organization_id}",
        amount_nanos_usd=note.amount_nanos_usd,
        reason=note.reason,
        resource=note.resource,
        invoice=note.invoice,
        create_time=to_timestamp(note.create_time),
        transaction_id=str(note.transaction_id),
        billing_month=f"{note.billing_month:%Y-%m}",
    )


def to_party(party: Party) -> invoice_pb2.BillingParty:
    return invoice_pb2.BillingParty(
        legal_name=party.legal_name, address_lines=party.address_lines, tax_id=party.tax_id, email=party.email
    )


def party_of(message: invoice_pb2.BillingParty) -> Party:
    return Party(
        legal_name=message.legal_name,
        address_lines=tuple(message.address_lines),
        tax_id=message.tax_id,
        email=message.email,
    )


def to_signed_money(nanos_usd: int) -> money_pb2.Money:
    """Below zero, both parts are."""
    sign = -1 if nanos_usd < 0 else 1
    units, nanos = divmod(abs(nanos_usd), NANOS_USD_PER_USD)
    return money_pb2.Money(currency_code="USD", units=sign * units, nanos=sign * nanos)


def dimensions_of(values: Iterable[invoice_service_pb2.CostDimension.ValueType]) -> list[Dimension]:
    """InvalidArgument for a dimension that is not known, and for one that comes twice."""
    found: list[Dimension] = []
    for index, value in enumerate(values):
        dimension = _DIMENSIONS.get(value)
        if dimension is None or dimension in found:
            problem = "is not known" if dimension is None else "comes twice"
            field = f"group_by[{index}]"
            raise InvalidArgument("INVALID_FIELD", f"{field} {problem}", violations=[FieldViolation(field, problem)])
        found.append(dimension)
    return found


def to_costs(rows: Iterable[CostRow]) -> invoice_service_pb2.QueryCostsResponse:
    answer = invoice_service_pb2.QueryCostsResponse()
    for row in rows:
        answer.rows.add(
            keys=row.keys,
            quantity=row.quantity,
            amount_nanos_usd=row.amount_nanos_usd,
            usage_record_count=row.usage_record_count,
        )
        answer.total_nanos_usd += row.amount_nanos_usd
    return answer


def invoice_name(organization_id: str, month: Month) -> str:
    return format_name(invoice_pb2.Invoice, organization=organization_id, invoice=str(month))


def _to_line(line: Line) -> invoice_pb2.InvoiceLine:
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
