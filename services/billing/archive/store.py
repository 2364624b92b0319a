"""Reads and writes the list of the archive's files, which is their chain. It knows no object and no event."""

from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from chassis.errors import Unavailable
from services.billing.archive.archive_format import GENESIS, PackedFile

_queries = load_queries(Path(__file__).parent / "queries.sql")


class FileRow(NamedTuple):
    """A file of the archive as it is listed; `removed_time` is set once its object was deleted."""

    position: int
    object_key: str
    sha256: bytes
    previous_sha256: bytes
    size_bytes: int
    event_count: int
    stream: str
    first_time: datetime
    last_time: datetime
    organization_ids: list[str]
    removed_time: datetime | None


class ArchiveStore:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def head(self) -> tuple[int, bytes]:
        """Position and digest of the newest file."""
        row = await _queries.get_archive_head(self._connection)
        return (row["position"], row["sha256"]) if row is not None else (0, GENESIS)

    async def begin_write(self, key: str) -> None:
        """Before the object is written: should its writer die, it is found and deleted."""
        await _queries.add_archive_write(self._connection, object_key=key)

    async def end_write(self, key: str) -> None:
        await _queries.end_archive_write(self._connection, object_key=key)

    async def add(self, file: PackedFile, organization_ids: Collection[str]) -> bool:
        """Adds a stored file at its place of the chain; False when another one is there."""
        header = file.header
        added = await _queries.add_archive_file(
            self._connection,
            position=header.position,
            object_key=file.key,
            sha256=file.sha256,
            previous_sha256=bytes.fromhex(header.previous_sha256),
            size_bytes=len(file.content),
            event_count=header.event_count,
            stream=header.stream,
            first_time=datetime.fromisoformat(header.first_time),
            last_time=datetime.fromisoformat(header.last_time),
            organization_ids=sorted(organization_ids),
        )
        if affected(added) == 0:
            return False
        if affected(await _queries.finish_archive_write(self._connection, object_key=file.key)) == 0:
            # Whoever collects what dead writers left took this one for dead, and its object is gone.
            raise Unavailable("DEPENDENCY_UNAVAILABLE", f"{file.key} took too long to be written")
        return True

    async def list_files(self, *, after_position: int, row_max: int) -> list[FileRow]:
        """In the order of the chain."""
        rows = _queries.list_archive_files(self._connection, after_position=after_position, row_max=row_max)
        return [FileRow._make(row) async for row in rows]

    async def beginnings(self) -> dict[str, datetime]:
        """By stream: from when on everything is archived and kept."""
        rows = _queries.list_archive_beginnings(self._connection)
        return {row["stream"]: row["begin_time"] async for row in rows}

    async def abandon_writes(self, *, older_s: float, row_max: int) -> list[str]:
        """Keys of objects that their writers left, and which nobody can add to the chain any more."""
        rows = _queries.abandon_writes(self._connection, older_s=older_s, row_max=row_max)
        return [row["object_key"] async for row in rows]

    async def list_expired(self, *, retention_s: float, row_max: int) -> list[tuple[int, str]]:
        """Positions and keys of files that have been kept for long enough."""
        rows = _queries.list_expired_files(self._connection, retention_s=retention_s, row_max=row_max)
        return [(row["position"], row["object_key"]) async for row in rows]

    async def mark_removed(self, position: int, key: str) -> None:
        """Before the object is deleted: a file that is gone and not marked would look like damage."""
        await self.begin_write(key)
        await _queries.mark_file_removed(self._connection, position=position)
