"""LedgerService: verification and export of the ledger, and the events that could not be booked.

It changes no entry. A dead letter that is run again is booked by the handler that books every event; one that is given
up stays with who did it and why.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from chassis import paging
from chassis.bus import dead_letters
from chassis.bus.consumer import Consumer
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import ResourceExhausted, invalid
from chassis.identity import current_caller
from chassis.names import parse_name
from finemesh.billing.v1 import ledger_service_pb2 as pb
from finemesh.billing.v1 import ledger_service_pb2_grpc
from finemesh.identity.v1 import identity_pb2
from services.billing.api.convert import dead_letter_to_proto, journal_entry_to_proto, progress_to_proto
from services.billing.api.requests import whole_account
from services.billing.audit.archive_audit import ArchiveAudit
from services.billing.audit.verification import Verification
from services.billing.config import BillingSettings
from services.billing.ledger.store import LedgerStore

OPERATOR_ROLE = "operator"
EVERY_ORGANIZATION = "organizations/-"
REASON_CHARS_MAX = 500


class LedgerService(ledger_service_pb2_grpc.LedgerServiceServicer):
    def __init__(
        self,
        pool: Pool,
        consumer: Consumer,
        outbox: Outbox,
        archive_audit: Callable[[str | None], ArchiveAudit],
        settings: BillingSettings,
        *,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._pages = paging.Pages(settings.page_token_key)
        self._archive_audit = archive_audit
        self._consumer = consumer
        self._outbox = outbox
        self._settings = settings
        self._clock = clock
        self._verifications = asyncio.Semaphore(settings.verifications_max)

    async def VerifyLedger(
        self, request: pb.VerifyLedgerRequest, context: Any
    ) -> AsyncIterator[pb.VerifyLedgerResponse]:
        organization_id = _organization(request.organization)
        if self._verifications.locked():
            raise ResourceExhausted(
                "CAPACITY_EXHAUSTED",
                f"{self._settings.verifications_max} verification(s) run already; try again when one is done",
                metadata={"limit": "verifications_max"},
            )
        async with self._verifications:
            told_s = self._clock.monotonic()
            verification = Verification(
                self._pool,
                organization_id,
                batch_rows=self._settings.verify_batch_rows,
                timeout_s=self._settings.verify_statement_timeout_s,
                names_scan_max=self._settings.invoice_names_scan_max,
            )
            async for _ in verification.run():
                if self._clock.monotonic() - told_s >= self._settings.verify_progress_s:
                    told_s = self._clock.monotonic()
                    yield progress_to_proto(verification.progress)
            if verification.progress.difference is not None:
                yield progress_to_proto(verification.progress, done=True)
                return
            archive = self._archive_audit(organization_id)
            async for _ in archive.run():
                if self._clock.monotonic() - told_s >= self._settings.verify_progress_s:
                    told_s = self._clock.monotonic()
                    yield progress_to_proto(verification.progress, archive.progress)
        yield progress_to_proto(verification.progress, archive.progress, done=True)

    async def ExportJournal(
        self, request: pb.ExportJournalRequest, context: Any
    ) -> AsyncIterator[pb.ExportJournalResponse]:
        organization_id = _organization(request.organization)
        if organization_id is None:
            raise invalid("organization", "must name one organization")
        if request.after_position < 0:
            raise invalid("after_position", "must not be negative")
        position, row_max = request.after_position, self._settings.journal_batch_rows
        while True:
            # A short read each: a slow client must not hold a connection.
            async with self._pool.acquire() as connection:
                rows = await LedgerStore(connection).list_journal(
                    organization_id, after_position=position, row_max=row_max
                )
            if rows:
                position = rows[-1].position
                yield pb.ExportJournalResponse(entries=[journal_entry_to_proto(row) for row in rows])
            if len(rows) < row_max:
                return

    async def ListDeadLetters(self, request: pb.ListDeadLettersRequest, context: Any) -> pb.ListDeadLettersResponse:
        current_caller().require_role(OPERATOR_ROLE)
        page = self._pages.read(
            request,
            scope=f"dead letters, discarded: {request.discarded}",
            kinds=paging.TIME_KINDS,
            maximum=self._settings.page_size_max,
        )
        after = page.after_time(uuid.UUID)
        answer = pb.ListDeadLettersResponse()
        # Events can be large: a page ends with its number of rows or when it fills half a message.
        size_bytes, bytes_max = 0, self._settings.message_size_bytes_max // 2
        while True:
            async with self._pool.acquire() as connection:
                letters = await dead_letters.list_dead_letters(
                    connection,
                    self._consumer.durable,
                    after=after,
                    row_max=self._settings.dead_letter_batch_rows,
                    discarded=request.discarded,
                )
            for letter in letters:
                if len(answer.dead_letters) == page.size or size_bytes > bytes_max:
                    assert after is not None
                    answer.next_page_token = page.token(paging.time_cursor(*after))
                    return answer
                event = self._consumer.read(letter.event_type, letter.payload)
                shown = dead_letter_to_proto(letter, event, json_bytes_max=bytes_max // 2)
                answer.dead_letters.append(shown)
                size_bytes += shown.ByteSize()
                after = letter.create_time, letter.event_id
            if len(letters) < self._settings.dead_letter_batch_rows:
                return answer

    async def ReplayDeadLetter(self, request: pb.ReplayDeadLetterRequest, context: Any) -> pb.ReplayDeadLetterResponse:
        current_caller().require_role(OPERATOR_ROLE)
        outcome = await dead_letters.replay(self._pool, self._consumer, _event_id(request.event_id))
        self._outbox.wake()
        return pb.ReplayDeadLetterResponse(booked=outcome.done, error=outcome.error)

    async def DiscardDeadLetter(
        self, request: pb.DiscardDeadLetterRequest, context: Any
    ) -> pb.DiscardDeadLetterResponse:
        caller = current_caller()
        caller.require_role(OPERATOR_ROLE)
        why = request.reason.strip()
        if not 1 <= len(why) <= REASON_CHARS_MAX:
            raise invalid("reason", f"must say why in 1 to {REASON_CHARS_MAX} characters")
        event_id = _event_id(request.event_id)
        async with transaction(self._pool) as connection:
            await dead_letters.discard(connection, self._consumer.durable, event_id, by=caller.subject, why=why)
        return pb.DiscardDeadLetterResponse()


def _event_id(value: str) -> uuid.UUID:
    try:
        return uuid.UUID(value)
    except ValueError:
        raise invalid("event_id", "must be the id of an event, a UUID") from None


def _organization(name: str) -> str | None:
    """Id of the organization that the caller may ask about; None for all of them. Entries name all projects."""
    caller = current_caller()
    if not name:
        return whole_account(caller)
    if name == EVERY_ORGANIZATION:
        caller.require_role(OPERATOR_ROLE)
        return None
    organization_id = parse_name(identity_pb2.Organization, name, "organization")["organization"]
    if organization_id == caller.account:
        return whole_account(caller)
    caller.require_role(OPERATOR_ROLE)
    return organization_id
