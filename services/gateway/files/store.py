"""Reads and writes files and the removals of their bytes. It decides nothing."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from formats.row_errors import RowError
from services.gateway.files.domain import StoredFile

QUERIES = load_queries(Path(__file__).parent / "queries.sql")


class FileStore:
    """Files and removals over one connection, inside the caller's transaction if there is one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, file: StoredFile) -> None:
        values = {name: getattr(file, name) for name in StoredFile.__dataclass_fields__}
        await QUERIES.add_file(self._connection, **{**values, "errors": [asdict(error) for error in file.errors]})

    async def file(self, project_id: str, file_id: str) -> StoredFile | None:
        row = await QUERIES.get_file(self._connection, project_id=project_id, file_id=file_id)
        return None if row is None else _file_of(row)

    async def list_files(self, project_id: str, before_id: str, limit: int) -> list[StoredFile]:
        rows = QUERIES.list_files(self._connection, project_id=project_id, before_id=before_id, limit=limit)
        return [_file_of(row) async for row in rows]

    async def delete(self, project_id: str, file_id: str, now: datetime) -> bool:
        """False when there is no such file."""
        status = await QUERIES.delete_file(self._connection, project_id=project_id, file_id=file_id, delete_time=now)
        return affected(status) == 1

    async def prune(self, retention_s: float, batch_max: int) -> int:
        """Forgets files that were deleted long ago, at most so many; returns how many."""
        return affected(await QUERIES.prune_files(self._connection, retention_s=retention_s, batch_max=batch_max))

    async def add_removal(self, artifact_key: str, delay_s: float) -> None:
        await QUERIES.add_removal(self._connection, artifact_key=artifact_key, delay_s=delay_s)

    async def take_back_removal(self, artifact_key: str) -> bool:
        """False when a removal was claimed, whose bytes may be gone."""
        return affected(await QUERIES.take_back_removal(self._connection, artifact_key=artifact_key)) == 1

    async def claim_removal(self, artifact_key: str) -> bool:
        """False when the bytes belong to a file now, or somebody else removes them."""
        return affected(await QUERIES.claim_removal(self._connection, artifact_key=artifact_key)) == 1

    async def finish_removal(self, artifact_key: str) -> None:
        await QUERIES.finish_removal(self._connection, artifact_key=artifact_key)

    async def claim_removals(self, *, claim_s: float, limit: int) -> list[str]:
        """Those whose time has come; a claim that is older than `claim_s` is taken over."""
        rows = QUERIES.claim_removals(self._connection, claim_s=claim_s, limit=limit)
        return [row["artifact_key"] async for row in rows]


def _file_of(row: Any) -> StoredFile:
    errors = tuple(RowError(**error) for error in row["errors"])
    return StoredFile(**{**row, "errors": errors, "features": tuple(row["features"])})
