"""An invoice as CSV (RFC 4180). Not pure: protobuf.

A header, a row for each line and credit note, what rounding added, and the total, which is the sum of the rows above.

Texts that a spreadsheet would run as a formula begin with an apostrophe instead; figures are never changed.
"""

import csv
import io

from finemesh.billing.v1 import invoice_pb2
from services.billing.invoices.documents.sheet import CURRENCY, PRICED_UNITS, given_back_of
from services.billing.prices.pricing import in_dollars

HEADER = (
    "row",
    "invoice",
    "month",
    "description",
    "project",
    "resource",
    "kind",
    "usage_kind",
    "model",
    "quantity",
    "unit",
    "unit_price",
    "unit_priced",
    "exact_amount",
    "amount",
    "currency",
    "price_book_version",
    "usage_records",
    "minimum_applied",
)
# What spreadsheets take for the beginning of a formula, in ASCII and in full width. They strip or skip what they cannot
# show before it, and some run what comes after a line break.
_FORMULA = frozenset("=+-@＝＋－＠")
_BREAKS = ("\t", "\r", "\n")


def to_csv(invoice: invoice_pb2.Invoice) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(HEADER)
    month = invoice.name.rpartition("/")[2]
    head = (text(invoice.number), month)
    for line in invoice.lines:
        writer.writerow(
            (
                "line",
                *head,
                *(text(value) for value in (line.description, line.project_id, line.resource, line.kind)),
                *(text(value) for value in (line.usage_kind, line.model)),
                line.quantity if line.unit else "",
                text(line.unit),
                in_dollars(line.unit_price_nanos_usd) if line.unit_price_nanos_usd else "",
                PRICED_UNITS.get(line.unit, "") if line.unit_price_nanos_usd else "",
                dollars(line.exact_nanos_usd),
                dollars(line.amount_nanos_usd),
                CURRENCY,
                text(line.price_book_version),
                line.usage_record_count,
                "true" if line.minimum_applied else "false",
            )
        )
    for note, given_back_nanos_usd in zip(invoice.credit_notes, given_back_of(invoice), strict=True):
        writer.writerow(
            _sum_row(
                "credit_note",
                head,
                f"{note.number}: {note.reason}",
                note.resource or note.invoice,
                exact=-note.amount_nanos_usd,
                counted=-given_back_nanos_usd,
            )
        )
    if invoice.rounding_nanos_usd:
        rounding = invoice.rounding_nanos_usd
        writer.writerow(_sum_row("rounding", head, "Rounding to the cent", "", exact=None, counted=rounding))
    writer.writerow(_sum_row("total", head, "Total", "", exact=None, counted=invoice.total_nanos_usd))
    return out.getvalue().encode()


def text(value: str) -> str:
    """A text that no spreadsheet runs."""
    seen = next((letter for letter in value if letter != " " and letter.isprintable()), "")
    return f"'{value}" if seen in _FORMULA or value.startswith(_BREAKS) else value


def dollars(nanos_usd: int) -> str:
    """A plain decimal number: `-1234.50`."""
    return f"-{in_dollars(-nanos_usd)}" if nanos_usd < 0 else in_dollars(nanos_usd)


def _sum_row(
    row: str, head: tuple[str, str], description: str, resource: str, *, exact: int | None, counted: int
) -> list[str]:
    values = {
        "row": row,
        "invoice": head[0],
        "month": head[1],
        "description": text(description),
        "resource": text(resource),
        "exact_amount": "" if exact is None else dollars(exact),
        "amount": dollars(counted),
        "currency": CURRENCY,
    }
    return [values.get(column, "") for column in HEADER]
