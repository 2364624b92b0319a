"""Between the contracts of the ledger and the domain; it decides nothing."""

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from chassis.bus.dead_letters import DeadLetter
from finemesh.billing.v1 import ledger_service_pb2 as pb
from services.billing.audit import EntryRow
from services.billing.convert import to_timestamp
from services.billing.verification import Progress


def to_verify_answer(progress: Progress, *, done: bool = False) -> pb.VerifyLedgerResponse:
    found = progress.difference
    return pb.VerifyLedgerResponse(
        check=progress.check,
        transaction_count=progress.transactions,
        usage_record_count=progress.usage_records,
        hold_count=progress.holds,
        invoice_count=progress.invoices,
        done=done,
        difference=pb.LedgerDifference(
            check=found.check, location=found.location, expected=found.expected, found=found.found
        )
        if found is not None
        else None,
    )


def to_journal_entry(row: EntryRow) -> pb.JournalEntry:
    assert row.id is not None and row.transaction_time is not None and row.hash is not None
    return pb.JournalEntry(
        transaction_id=str(row.id),
        position=row.position,
        kind=row.kind or "",
        organization_id=row.organization_id,
        resource=row.resource or "",
        price_book_version=row.price_book_version or "",
        transaction_time=to_timestamp(row.transaction_time),
        postings=[
            pb.JournalPosting(account=account, amount_nanos_usd=amount)
            for account, amount in zip(row.accounts or (), row.amounts or (), strict=True)
        ],
        hash=row.hash.hex(),
    )


def to_dead_letter(letter: DeadLetter, event: Message | None, *, json_bytes_max: int) -> pb.DeadLetter:
    """`event` is None where its bytes cannot be read; one whose JSON is too long for an answer is left out as well."""
    shown = "" if event is None else MessageToJson(event, preserving_proto_field_name=True, indent=None)
    return pb.DeadLetter(
        event_id=str(letter.event_id),
        subject=letter.subject,
        reason=letter.reason,
        error=letter.error,
        failures=letter.failures,
        create_time=to_timestamp(letter.create_time),
        event_json=shown if len(shown.encode()) <= json_bytes_max else "",
    )
