"""Folders of ended jobs in the database, and what stays in each."""

from collections.abc import Sequence
from dataclasses import dataclass
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

    async def kept(self, refs: Sequence[JobRef]) -> dict[str, Kept]:
        """By job."""
        rows = _QUERIES.list_kept(self._connection, job_ids=[ref.job_id for ref in refs])
        return {
            row["job_id"]: Kept(checkpoints=tuple(row["checkpoints"]), model=row["output_artifact"])
            async for row in rows
        }

    async def finish(self, ref: JobRef, node: str, claim: UUID) -> bool:
        """Ends the stage that the folder is at; False when the claim was taken over, or is another node's."""
        named = {"project_id": ref.project_id, "job_id": ref.job_id, "node": node, "claim": claim}
        # The last stage first: the other way round, one call would end both.
        forgotten = affected(await _QUERIES.forget_folder(self._connection, **named))
        return forgotten > 0 or affected(await _QUERIES.advance_folder(self._connection, **named)) > 0
