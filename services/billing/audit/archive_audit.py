"""Compares the ledger with the events that it was booked from, in the archive. Not pure: database, objects, bus.

Every file of the chain must be there unchanged, everything booked must be claimed by an event, and everything that an
event claims must be booked or set aside. What the archive cannot have, because it is older, is counted and said.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from chassis.bus.connection import Bus
from chassis.db.pool import Pool
from chassis.objects.object_store import ObjectStore
from services.billing.archive.archive_format import GENESIS, ArchivedEvent
from services.billing.archive.archive_reader import ArchiveDamaged, read_file, read_waiting
from services.billing.archive.store import ArchiveStore, FileRow
from services.billing.archive.work_claims import read_claims
from services.billing.audit.claim_store import Beginning, ClaimRow, ClaimStore
from services.billing.audit.difference import Difference, difference
from services.billing.config import BillingSettings

ARCHIVE_FILES = "archive files"
ARCHIVED_USAGE = "archived usage"
_ROWS_AT_A_TIME = 500
_LATEST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class ArchiveProgress:
    """What was read so far. `older_records` are booked from events before `begin_time`, when the archive begins."""

    check: str = ARCHIVE_FILES
    files: int = 0
    events: int = 0
    older_records: int = 0
    begin_time: datetime | None = None
    difference: Difference | None = None


class ArchiveAudit:
    """One run. `progress` is where it stands; `run` moves it on and returns at the end or at the first difference."""

    def __init__(
        self,
        pool: Pool,
        bus: Bus,
        objects: ObjectStore,
        settings: BillingSettings,
        organization_id: str | None,
        *,
        consumer: str,
    ) -> None:
        self._pool = pool
        self._bus = bus
        self._objects = objects
        self._settings = settings
        self._organization_id = organization_id
        self._consumer = consumer
        self._position, self._digest = 0, GENESIS
        self.progress = ArchiveProgress()

    async def run(self) -> AsyncIterator[None]:
        """Yields now and then, so that whoever waits can look at `progress`. Unavailable while bus or objects are
        away."""
        async with self._pool.acquire() as connection:
            claims = ClaimStore(connection, self._organization_id, timeout_s=self._settings.verify_statement_timeout_s)
            await claims.begin()
            try:
                async for _ in self._read(claims, ArchiveStore(connection)):
                    yield
                if self.progress.difference is None:
                    async for _ in self._compare(claims, ArchiveStore(connection)):
                        yield
            finally:
                await claims.end()

    async def _read(self, claims: ClaimStore, files: ArchiveStore) -> AsyncIterator[None]:
        """The bus before the list of files: what leaves the one is in the other by then."""
        async for event in read_waiting(self._bus, batch_max=self._settings.archive_fetch_max):
            await self._add(claims, [event])
        while rows := await files.list_files(after_position=self._position, row_max=_ROWS_AT_A_TIME):
            for row in rows:
                if (wrong := self._wrong_place(row)) is not None:
                    self._found(wrong)
                    return
                if row.removed_time is None and self._concerns(row):
                    try:
                        events = await read_file(
                            self._objects, row, unpacked_bytes_max=self._settings.archive_unpacked_bytes_max
                        )
                    except ArchiveDamaged as damage:
                        self._found(difference(ARCHIVE_FILES, row.object_key, damage.expected, damage.found))
                        return
                    await self._add(claims, events)
                self.progress = replace(self.progress, files=self.progress.files + 1)
                yield

    async def _compare(self, claims: ClaimStore, files: ArchiveStore) -> AsyncIterator[None]:
        self.progress = replace(self.progress, check=ARCHIVED_USAGE)
        yield
        beginnings = await files.beginnings()
        begin = Beginning(*(beginnings.get(stream, _LATEST) for stream in ("USAGE", "TUNING")))
        await claims.find_unarchived()
        # What was booked while files were read came from events that were not read yet.
        async for _ in self._read(claims, files):
            yield
        if self.progress.difference is not None:
            return
        if (unclaimed := await claims.unarchived(begin)) is not None:
            where = f"organizations/{unclaimed['organization_id']} projects/{unclaimed['project_id']}"
            location = f"{where} {unclaimed['kind']} {unclaimed['work_key']}"
            self._found(difference(ARCHIVED_USAGE, location, "an event that claims it", "none"))
            return
        yield
        await claims.add_dead_letters(self._consumer)
        unbooked = await claims.unbooked(self._consumer, handled_within_s=self._settings.inbox_retention_s)
        if unbooked is not None:
            where = f"organizations/{unbooked['organization_id']} projects/{unbooked['project_id']}"
            location = f"{where} {unbooked['kind']} {unbooked['work_key']}"
            booked = unbooked["booked_quantity"]
            found = "nothing" if booked is None else f"quantity {booked}, or another owner"
            self._found(difference(ARCHIVED_USAGE, location, f"quantity {unbooked['quantity']}", found))
            return
        older = await claims.count_older(begin)
        begin_time = None if begin.usage == _LATEST else begin.usage
        self.progress = replace(self.progress, older_records=older, begin_time=begin_time)

    async def _add(self, claims: ClaimStore, events: Sequence[ArchivedEvent]) -> None:
        await claims.add(_rows(events))
        self.progress = replace(self.progress, events=self.progress.events + len(events))

    def _wrong_place(self, row: FileRow) -> Difference | None:
        """Also what is wrong with the list itself: every file names the one before it."""
        if row.position != self._position + 1:
            return difference(ARCHIVE_FILES, f"file {self._position + 1}", "a file", "none")
        if row.previous_sha256 != self._digest:
            return difference(ARCHIVE_FILES, row.object_key, self._digest, row.previous_sha256)
        self._position, self._digest = row.position, row.sha256
        return None

    def _concerns(self, row: FileRow) -> bool:
        return self._organization_id is None or self._organization_id in row.organization_ids

    def _found(self, found: Difference) -> None:
        self.progress = replace(self.progress, check=found.check, difference=found)


def _rows(events: Iterable[ArchivedEvent]) -> list[ClaimRow]:
    return [
        ClaimRow(event.id, event.time, False, *claim)
        for event in events
        for claim in read_claims(event.type, event.payload)
    ]
