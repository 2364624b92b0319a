"""Folders of ended jobs in the database, and what stays in each."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from services.scheduler.jobs.job import JobRef

_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Encoded finemesh.artifacts.v1.Artifact each; no model where the job made none."""

    checkpoints: tuple[bytes, ...]
    model: bytes | None


class FolderStore:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def claim(
        self, stage: int, retention_s: float, node: str, claim: UUID, claim_s: float, page_size: int
    ) -> list[JobRef]:
        """Folders at this stage of jobs that ended so long ago."""
        rows = _QUERIES.claim_folders(
            self._connection,
            stage=stage,
            retention_s=retention_s,
            node=node,
            claim=claim,
            claim_s=claim_s,
            page_size=page_size,
        )
        return [JobRef(**row) async for row in rows]

    async def give_up_checkpoints(self, refs: Sequence[JobRef]) -> None:
        """Those that nobody asked to keep."""
        await _QUERIES.give_up_checkpoints(self._connection, job_ids=[ref.job_id for ref in refs])

    async def note_deleted_model(self, ref: JobRef, delete_time: datetime) -> bool:
        """The job's model is to be removed; False when that is known already, or there is no such job."""
        named = {"project_id": ref.project_id, "job_id": ref.job_id}
        if not affected(await _QUERIES.note_deleted_model(self._connection, **named, delete_time=delete_time)):
            return False
        await _QUERIES.add_deleted_model(self._connection, **named)
        return True

    async def claim_deleted_models(
        self, retention_s: float, node: str, claim: UUID, claim_s: float, page_size: int
    ) -> list[JobRef]:
        """Jobs whose model was deleted so long ago, and that no unfinished job starts from."""
        rows = _QUERIES.claim_deleted_models(
            self._connection, retention_s=retention_s, node=node, claim=claim, claim_s=claim_s, page_size=page_size
        )
        return [JobRef(**row) async for row in rows]

    async def kept(self, refs: Sequence[JobRef]) -> dict[str, Kept]:
        """By job."""
        rows = _QUERIES.list_kept(self._connection, job_ids=[ref.job_id for ref in refs])
        return {
            row["job_id"]: Kept(checkpoints=tuple(row["checkpoints"]), model=row["output_artifact"])
            async for row in rows
        }

    async def finish(self, ref: JobRef, node: str, claim: UUID) -> bool:
        """Ends what was claimed: the stage that the folder is at, or the removal of its model. False when the claim was
        taken over, or is another node's."""
        named = {"project_id": ref.project_id, "job_id": ref.job_id, "node": node, "claim": claim}
        if affected(await _QUERIES.forget_deleted_model(self._connection, **named)):
            return True
        # The last stage first: the other way round, one call would end both.
        forgotten = affected(await _QUERIES.forget_folder(self._connection, **named))
        return forgotten > 0 or affected(await _QUERIES.advance_folder(self._connection, **named)) > 0
