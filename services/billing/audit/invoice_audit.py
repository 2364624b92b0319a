"""Rebuilds closed invoices by the code that closes them, into the bytes that are stored. Not pure: database, protobuf.

The figures come from the sums of usage, the holds and the credit notes of the month. Names, addresses, the wording of
lines, the debt of the moment and the rule of rounding are taken from the stored invoice; nothing else is.
"""

from collections.abc import Sequence
from dataclasses import replace

from google.protobuf.message import DecodeError

from chassis.db.pool import Connection
from chassis.timestamps import time_from_proto
from finemesh.billing.v1 import invoice_pb2
from services.billing.audit.difference import Difference, difference
from services.billing.audit.document_audit import INVOICES, InvoiceRow, wrong_digest, wrong_values
from services.billing.audit.store import AuditStore
from services.billing.calendar import Month
from services.billing.invoices.convert import encode, invoice_to_proto, party_from_proto, rounding_of
from services.billing.invoices.invoice import Charge, Invoice, LineKind, build_lines
from services.billing.invoices.store import InvoiceStore
from services.billing.ledger.derived_ids import usage_record_id


class InvoiceAudit:
    """`names_scan_max` is how many records are looked at to name those of lines, as when an invoice is closed."""

    def __init__(self, connection: Connection, reader: AuditStore, *, names_scan_max: int) -> None:
        self._connection = connection
        self._reader = reader
        self._names_scan_max = names_scan_max

    async def invoice(self, row: InvoiceRow) -> Difference | None:
        different = wrong_digest(row)
        if different is not None:
            return different
        try:
            stored = invoice_pb2.Invoice.FromString(row.content)
        except DecodeError as error:
            return difference(INVOICES, row.location, "an invoice", repr(error))
        charges = await InvoiceStore(self._connection).list_charges(
            row.organization_id, row.billing_month, row_max=len(stored.lines) + 1
        )
        rounding = rounding_of(stored)
        lines = build_lines(charges, rounding)
        if len(lines) != len(stored.lines):
            return wrong_values(row, "", [("lines", len(lines), len(stored.lines))])
        # The stored wording goes into the rebuilt lines as it is, and the stored names once each is found to be of a
        # record of its line. A minimum has none.
        named = [
            replace(
                line,
                description=kept.description,
                charge=line.charge
                if line.charge.kind is LineKind.MINIMUM
                else replace(line.charge, usage_records=tuple(kept.usage_records)),
            )
            for line, kept in zip(lines, stored.lines, strict=True)
        ]
        notes = await InvoiceStore(self._connection).list_month_notes(
            row.organization_id, row.billing_month, row_max=len(stored.credit_notes) + 1
        )
        rebuilt = Invoice(
            organization_id=row.organization_id,
            month=Month.from_day(row.billing_month),
            lines=tuple(named),
            credit_notes=tuple(notes),
            issuer=party_from_proto(stored.issuer),
            customer=party_from_proto(stored.customer),
            tax_note=stored.tax_note,
            owed_nanos_usd=stored.owed_nanos_usd,
            rounding=rounding,
            number=row.number,
            close_time=row.close_time,
        )
        different = _wrong_content(row, invoice_to_proto(rebuilt), stored)
        if different is None and row.total_nanos_usd != rebuilt.total_nanos_usd:
            different = wrong_values(row, "", [("total", rebuilt.total_nanos_usd, row.total_nanos_usd)])
        if different is None and encode(rebuilt) != row.content:
            different = difference(INVOICES, row.location, encode(rebuilt), row.content)
        return different or await self._wrong_names(
            row, [line.charge for line in named if line.charge.kind is not LineKind.MINIMUM]
        )

    async def _wrong_names(self, row: InvoiceRow, charges: Sequence[Charge]) -> Difference | None:
        """Links to usage records that are not behind their line."""
        again = await InvoiceStore(self._connection).with_names(
            row.organization_id,
            row.billing_month,
            charges,
            name_max=max((len(charge.usage_records) for charge in charges), default=0),
            scan_max=self._names_scan_max,
        )
        for charge, recomputed in zip(charges, again, strict=True):
            # What came after the close can hide the first records from a bounded look: then all of them are looked at.
            unknown = set(charge.usage_records) - set(recomputed.usage_records)
            if unknown:
                unknown = await self._not_behind(row, charge, unknown)
            if unknown:
                where = f"{row.location} line {charge.resource} {charge.usage_kind}".rstrip()
                return difference(INVOICES, where, "usage records of the line", min(unknown))
        return None

    async def _not_behind(self, row: InvoiceRow, charge: Charge, names: set[str]) -> set[str]:
        left = set(names)
        async for work_key in self._reader.line_records(
            row.organization_id, row.billing_month, charge.project_id, charge.resource, charge.usage_kind
        ):
            left.discard(f"projects/{charge.project_id}/usageRecords/{usage_record_id(charge.project_id, work_key)}")
            if not left:
                break
        return left


def _wrong_content(row: InvoiceRow, rebuilt: invoice_pb2.Invoice, stored: invoice_pb2.Invoice) -> Difference | None:
    """The first figure that is not as it was rebuilt, by its place on the invoice."""
    for wanted, found in zip(rebuilt.lines, stored.lines, strict=True):
        different = wrong_values(row, f" line {wanted.resource} {wanted.usage_kind}".rstrip(), _fields(wanted, found))
        if different is not None:
            return different
    if len(rebuilt.credit_notes) != len(stored.credit_notes):
        return wrong_values(row, "", [("credit notes", len(rebuilt.credit_notes), len(stored.credit_notes))])
    for note, kept in zip(rebuilt.credit_notes, stored.credit_notes, strict=True):
        different = wrong_values(row, f" credit note {note.number}", _fields(note, kept))
        if different is not None:
            return different
    closed = time_from_proto(stored.close_time)
    figures = [
        ("number", rebuilt.number, stored.number),
        ("name", rebuilt.name, stored.name),
        ("close time", row.close_time, closed),
        ("total", rebuilt.total_nanos_usd, stored.total_nanos_usd),
        ("open", rebuilt.open, stored.open),
    ]
    return wrong_values(row, "", figures)


def _fields(wanted: object, found: object) -> list[tuple[str, object, object]]:
    """(name, recomputed, stored) for each field of two messages of one kind."""
    names = [field.name for field in wanted.DESCRIPTOR.fields]  # type: ignore[attr-defined]
    return [(name, _plain(getattr(wanted, name)), _plain(getattr(found, name))) for name in names]


def _plain(value: object) -> object:
    return str(value).strip() if hasattr(value, "DESCRIPTOR") else value
