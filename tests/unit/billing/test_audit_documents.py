"""What credit notes say together: no invoice is given back beyond its total, and none that is not closed."""

import hashlib
from datetime import UTC, date, datetime

from services.billing.audit.difference import Difference
from services.billing.audit.document_audit import CreditNoteRow, CreditNotesAudit, InvoiceRow
from services.billing.ledger import entries

NOW = datetime(2026, 12, 5, tzinfo=UTC)
NOVEMBER = "organizations/o/invoices/2026-11"


def note(number: int, amount: int, invoice: str = NOVEMBER, organization: str = "o") -> CreditNoteRow:
    entry = entries.credit_note(
        organization_id=organization, request_id=f"r{number}", amount_nanos_usd=amount, resource="", now=NOW
    )
    return CreditNoteRow(
        organization_id=organization,
        number=number,
        request_id=f"r{number}",
        amount_nanos_usd=amount,
        resource="",
        invoice=invoice,
        transaction_id=entry.id,
        billing_month=date(2026, 12, 1),
        create_time=NOW,
        entry_id=entry.id,
        position=number,
        entry_resource=entry.resource,
        transaction_time=NOW,
        revenue_nanos_usd=-amount,
    )


def audited(*notes: CreditNoteRow) -> Difference | None:
    audit = CreditNotesAudit({"o": {date(2026, 11, 1)}})
    audit.invoice(InvoiceRow("o", date(2026, 11, 1), 1, b"", hashlib.sha256(b"").digest(), 100, NOW))
    return next((found for each in notes if (found := audit.note(each)) is not None), None)


def test_notes_within_the_total_agree_and_those_of_no_invoice_do_not_count() -> None:
    assert audited(note(1, 60), note(2, 40), note(3, 500, invoice="")) is None


def test_the_note_that_goes_beyond_the_total_is_named() -> None:
    found = audited(note(1, 60), note(2, 41))
    assert found is not None
    assert (found.check, found.location) == ("credit notes", "organizations/o CN-000002")
    assert (found.expected, found.found) == (f"at most 40 that are left of {NOVEMBER}", "41")


def test_a_note_corrects_a_closed_invoice_of_its_own_organization() -> None:
    for wrong in (note(1, 1, "organizations/o/invoices/2026-10"), note(1, 1, organization="stranger")):
        found = audited(wrong)
        assert found is not None
        assert found.expected == "a closed invoice of the organization"
