"""An invoice in each of its formats: content, media type and a name for the file. Not pure: protobuf."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from google.protobuf.json_format import MessageToJson

from finemesh.billing.v1 import invoice_pb2
from finemesh.billing.v1 import invoice_service_pb2 as pb
from services.billing.invoices.documents.csv_file import to_csv
from services.billing.invoices.documents.page import to_html
from services.billing.invoices.documents.pdf import to_pdf
from services.billing.invoices.documents.sheet import sheet_of


@dataclass(frozen=True, kw_only=True)
class Document:
    content: bytes
    content_type: str
    filename: str


def to_json(invoice: invoice_pb2.Invoice) -> bytes:
    """The message with the names of its contract and every field, set or not."""
    return MessageToJson(
        invoice, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, ensure_ascii=False
    ).encode()


_Writer = Callable[[invoice_pb2.Invoice], bytes]
_HTML: tuple[_Writer, str, str] = (lambda invoice: to_html(sheet_of(invoice)), "text/html; charset=utf-8", "html")
_FORMATS: Mapping[int, tuple[_Writer, str, str]] = MappingProxyType(
    {
        pb.INVOICE_FORMAT_UNSPECIFIED: _HTML,
        pb.INVOICE_FORMAT_HTML: _HTML,
        pb.INVOICE_FORMAT_PDF: (lambda invoice: to_pdf(sheet_of(invoice)), "application/pdf", "pdf"),
        pb.INVOICE_FORMAT_CSV: (to_csv, "text/csv; charset=utf-8; header=present", "csv"),
        pb.INVOICE_FORMAT_JSON: (to_json, "application/json", "json"),
    }
)


def render(invoice: invoice_pb2.Invoice, format_: int) -> Document:
    """An open invoice has no number, so its file is named after the month."""
    write, content_type, ending = _FORMATS[format_]
    stem = invoice.number or f"invoice-{invoice.name.rpartition('/')[2]}-open"
    return Document(content=write(invoice), content_type=content_type, filename=f"{stem}.{ending}")
