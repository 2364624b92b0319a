"""Holds what events claim beside what is booked, in tables of one session. It reads no event and decides nothing."""

import uuid
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from chassis.bus.envelope import stored_envelope
from chassis.db.pool import Connection
from chassis.db.queries import load_queries
from services.billing.archive.work_claims import read_claims

_queries = load_queries(Path(__file__).parent / "queries.sql")
_EVERY = ""


class ClaimRow(NamedTuple):
    """A claim of an event, with when the bus took the event; `set_aside`: it is among the dead letters."""

    event_id: uuid.UUID | None
    event_time: datetime
    set_aside: bool
    organization_id: str
    project_id: str
    work_key: str
    kind: str
    resource: str
    model: str
    quantity: int


class Beginning(NamedTuple):
    """From when on the archive has all usage, and all ends of jobs."""

    usage: datetime
    endings: datetime


class ClaimStore:
    """Of one organization, or of all when its id is None. Not in a transaction: its tables are the session's."""

    def __init__(self, connection: Connection, organization_id: str | None, *, timeout_s: float) -> None:
        self._connection = connection
        self._organization_id = organization_id
        self._timeout_s = timeout_s

    async def begin(self) -> None:
        await self.end()
        await _queries.create_archived_claims(self._connection)
        await _queries.create_unarchived_work(self._connection)

    async def end(self) -> None:
        await _queries.drop_archived_claims(self._connection)

    async def add(self, rows: Sequence[ClaimRow]) -> None:
        """Claims of other organizations are left out."""
        own = [row for row in rows if self._organization_id in (None, row.organization_id)]
        await self._connection.copy_records_to_table(
            "archived_claims", records=own, columns=ClaimRow._fields, timeout=self._timeout_s
        )

    async def add_dead_letters(self, consumer: str) -> None:
        """What waits among the dead letters, whole events and parts of them."""
        async with self._connection.transaction():
            letters = [row async for row in _queries.stream_dead_letters(self._connection, consumer=consumer)]
        for row in letters:
            event = stored_envelope(row["event_id"], row["headers"], row["created_at"])
            claims = read_claims(event.type, row["payload"])
            await self.add([ClaimRow(row["event_id"], row["created_at"], True, *claim) for claim in claims])

    async def find_unarchived(self) -> None:
        """Collects what is booked now and claimed by no event so far."""
        await _queries.analyze_archived_claims(self._connection)
        await self._first("find_unarchived_work", self._organization_id or _EVERY)

    async def unarchived(self, begin: Beginning) -> Any | None:
        """The first of what was collected that is not older than the archive, and that is still claimed by no event."""
        return await self._first("get_unarchived_work", begin.endings, begin.usage)

    async def count_older(self, begin: Beginning) -> int:
        """How much of what was collected is older than the archive."""
        row = await self._first("count_work_before_archive", begin.endings, begin.usage)
        assert row is not None
        count: int = row[0]
        return count

    async def unbooked(self, consumer: str, *, handled_within_s: float) -> Any | None:
        """The first claim that is neither booked as it is nor set aside, of an event that was handled: every event
        older than `handled_within_s` was."""
        return await self._first("get_unbooked_claim", handled_within_s, consumer)

    async def _first(self, name: str, *values: object) -> Any | None:
        """The first row; the statement may take as long as a large ledger needs."""
        async with self._connection.transaction():
            await _queries.allow_long_statements(self._connection, timeout_ms=str(int(self._timeout_s * 1000)))
            return await self._connection.fetchrow(getattr(_queries, name).sql, *values, timeout=self._timeout_s)
