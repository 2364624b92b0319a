"""What admission reads and keeps: jobs and checkpoints to continue from, token counts of analysed files, and quotes in
line."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

from chassis.db.pool import Connection, Pool
from chassis.db.queries import affected, load_queries
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.spec.origin import OriginName

_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))


@dataclass(frozen=True, kw_only=True)
class OriginJob:
    """A job that another one may continue; `spec` and `output_artifact` are encoded messages."""

    job_id: str
    state: JobState
    spec: bytes
    base_model: str
    base_revision: str
    output_revision: str
    output_artifact: bytes | None
    model_delete_time: datetime | None


@dataclass(frozen=True, kw_only=True)
class KeptCheckpoint:
    """`artifact` is an encoded finemesh.artifacts.v1.Artifact."""

    step: int
    manifest_sha256: str
    artifact: bytes


@dataclass(frozen=True, kw_only=True)
class CountsKey:
    """A file under one base model and setting."""

    file_sha256: str
    base_revision: str
    sequence_tokens_max: int
    train_on_inputs: str


@dataclass(frozen=True, kw_only=True)
class FileCounts:
    """What the code of `preparation_version` counted in a file."""

    example_count: int
    token_count: int
    labelled_token_count: int
    truncated_count: int
    longest_tokens: int
    plan_sha256: str
    format: str
    preparation_version: str
    rows_per_second: float
    # Of what steps are made, each row alone and packed; 0 where an earlier version counted.
    row_count: int
    packed_sequence_count: int


class AdmissionStore:
    def __init__(self, connection: "Connection | Pool") -> None:
        self._connection = connection

    async def get_origin(self, project_id: str, name: OriginName) -> OriginJob | None:
        row = await _QUERIES.get_origin(
            self._connection,
            project_id=project_id,
            job_id=name.job_id,
            output_name=name.output_name,
            namespace=name.namespace,
        )
        return None if row is None else OriginJob(**{**row, "state": JobState(row["state"])})

    async def get_kept_checkpoint(self, project_id: str, job_id: str, step: int) -> KeptCheckpoint | None:
        """Step -1 stands for the newest one."""
        row = await _QUERIES.get_kept_checkpoint(self._connection, project_id=project_id, job_id=job_id, step=step)
        return None if row is None else KeptCheckpoint(**row)

    async def keep_checkpoint(self, project_id: str, job_id: str, step: int) -> bool:
        """From now on it stays, whatever its job commits later; False when it was given up meanwhile."""
        status = await _QUERIES.keep_checkpoint(self._connection, project_id=project_id, job_id=job_id, step=step)
        return affected(status) > 0

    async def keep_model(self, project_id: str, job_id: str) -> bool:
        """Until this transaction ends nobody can delete the job's model; False when it was deleted meanwhile."""
        return await _QUERIES.keep_model(self._connection, project_id=project_id, job_id=job_id) is not None

    async def prune_counts(self, retention_s: float, batch_max: int) -> int:
        """Deletes old counts, at most so many; returns how many."""
        return affected(await _QUERIES.prune_analyses(self._connection, retention_s=retention_s, batch_max=batch_max))

    async def get_counts(self, key: CountsKey, preparation_version: str) -> FileCounts | None:
        row = await _QUERIES.get_analysis(self._connection, **vars(key), preparation_version=preparation_version)
        return None if row is None else FileCounts(**row)

    async def insert_counts(self, key: CountsKey, counts: FileCounts, now: datetime) -> FileCounts:
        """The counts that stand from now on: another worker may have been first."""
        await _QUERIES.insert_analysis(self._connection, **vars(key), **vars(counts), now=now)
        first = await self.get_counts(key, counts.preparation_version)
        assert first is not None
        return first

    async def take_quote_place(
        self, place_id: UUID, *, account: str, subject: str, per_key_max: int, duration_s: float
    ) -> bool:
        """In a transaction; False when the key has `per_key_max` places already."""
        await _QUERIES.lock_quotes_of_key(self._connection, account=account, subject=subject)
        status = await _QUERIES.take_quote_place(
            self._connection,
            place_id=place_id,
            account=account,
            subject=subject,
            per_key_max=per_key_max,
            duration_s=duration_s,
        )
        return affected(status) > 0

    async def renew_quote_places(self, place_ids: Collection[UUID], duration_s: float) -> None:
        await _QUERIES.renew_quote_places(self._connection, place_ids=sorted(place_ids), duration_s=duration_s)

    async def release_quote_place(self, place_id: UUID) -> None:
        await _QUERIES.release_quote_place(self._connection, place_id=place_id)

    async def prune_quote_places(self, batch_max: int) -> int:
        """Deletes places whose process died, at most so many; returns how many."""
        return affected(await _QUERIES.prune_quote_places(self._connection, batch_max=batch_max))
