"""Reads and writes files and the removals of their bytes. It decides nothing."""

from collections.abc import Collection
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from formats.row_errors import RowError
from services.gateway.files.domain import DueRemoval, Storage, StorageQuota, StoredFile

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

    async def lock_storage(self, project_id: str) -> None:
        await QUERIES.lock_storage(self._connection, project_id=project_id)

    async def storage(self, project_id: str, default: StorageQuota) -> Storage | None:
        """None when there is no such project; `default` counts where it has no quota of its own."""
        row = await QUERIES.get_storage(self._connection, project_id=project_id)
        if row is None:
            return None
        own_bytes, own_files = row["stored_bytes_max"], row["stored_files_max"]
        return Storage(
            size_bytes=row["size_bytes"],
            file_count=row["file_count"],
            size_bytes_max=default.size_bytes_max if own_bytes is None else own_bytes,
            file_count_max=default.file_count_max if own_files is None else own_files,
        )

    async def set_quota(self, project_id: str, size_bytes_max: int | None, file_count_max: int | None) -> bool:
        """None is what the settings say. False when there is no such project."""
        status = await QUERIES.set_quota(
            self._connection, project_id=project_id, stored_bytes_max=size_bytes_max, stored_files_max=file_count_max
        )
        return affected(status) == 1

    async def add_reservation(self, artifact_key: str, delay_s: float, project_id: str, reserved_bytes: int) -> None:
        await QUERIES.add_reservation(
            self._connection,
            artifact_key=artifact_key,
            delay_s=delay_s,
            project_id=project_id,
            reserved_bytes=reserved_bytes,
        )

    async def grow_reservation(self, artifact_key: str, reserved_bytes: int) -> bool:
        """False when its time is over."""
        status = await QUERIES.grow_reservation(
            self._connection, artifact_key=artifact_key, reserved_bytes=reserved_bytes
        )
        return affected(status) == 1

    async def add_removal(self, artifact_key: str, delay_s: float) -> None:
        await QUERIES.add_removal(self._connection, artifact_key=artifact_key, delay_s=delay_s)

    async def take_back_removal(self, artifact_key: str) -> bool:
        """False when the time is over and the bytes may be gone."""
        return affected(await QUERIES.take_back_removal(self._connection, artifact_key=artifact_key)) == 1

    async def claim_removal(self, artifact_key: str) -> bool:
        """False when the bytes belong to a file now, or somebody else removes them."""
        return affected(await QUERIES.claim_removal(self._connection, artifact_key=artifact_key)) == 1

    async def finish_removal(self, artifact_key: str) -> None:
        await QUERIES.finish_removal(self._connection, artifact_key=artifact_key)

    async def claim_removals(self, *, claim_s: float, limit: int) -> list[DueRemoval]:
        """Those whose time has come; a claim that is older than `claim_s` is taken over."""
        rows = QUERIES.claim_removals(self._connection, claim_s=claim_s, limit=limit)
        return [DueRemoval(**row) async for row in rows]

    async def postpone_removals(self, artifact_keys: Collection[str], delay_s: float) -> None:
        await QUERIES.postpone_removals(self._connection, artifact_keys=[*artifact_keys], delay_s=delay_s)


def _file_of(row: Any) -> StoredFile:
    errors = tuple(RowError(**error) for error in row["errors"])
    return StoredFile(**{**row, "errors": errors, "features": tuple(row["features"])})
