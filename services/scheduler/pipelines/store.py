"""Workers' claims on jobs in the database. A claim is a token and a time: an answer whose claim was lost is dropped.

All times of claims are written and compared by the database's clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

from chassis.db.pool import Connection, Pool
from chassis.db.queries import affected, load_queries
from services.scheduler.jobs.job import EventKind, JobRef

_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))


@dataclass(frozen=True, kw_only=True)
class Claim(JobRef):
    """A job that a worker holds for a while."""

    claim: UUID
    # Failures in a row of services that the work needs.
    service_failures: int


@dataclass(frozen=True, kw_only=True)
class ValidationClaim(Claim):
    """A job that a worker analyses and prices; bytes are encoded messages."""

    organization_id: str
    api_key_id: str
    spec: bytes
    base_model: str
    base_revision: str
    parameter_count: int
    base_artifact: bytes
    training_artifact: bytes
    validation_artifact: bytes | None
    dataset_bytes: int


class ClaimStore:
    def __init__(self, connection: "Connection | Pool") -> None:
        self._connection = connection

    async def lock_validations(self) -> None:
        """Until the transaction ends, nobody else claims a job to validate."""
        await _QUERIES.lock_validations(self._connection)

    async def claim_validating(
        self,
        claim: UUID,
        *,
        claim_s: float,
        organization_max: int,
        large_bytes_min: int,
        organization_large_max: int,
        takes_large: bool,
    ) -> ValidationClaim | None:
        row = await _QUERIES.claim_validating(
            self._connection,
            claim=claim,
            claim_s=claim_s,
            organization_max=organization_max,
            large_bytes_min=large_bytes_min,
            organization_large_max=organization_large_max,
            takes_large=takes_large,
        )
        return None if row is None else ValidationClaim(**row, claim=claim)

    async def claim_release(self, claim: UUID, *, claim_s: float) -> Claim | None:
        row = await _QUERIES.claim_release(self._connection, claim=claim, claim_s=claim_s)
        return None if row is None else Claim(**row, claim=claim)

    async def renew(self, job: Claim, *, claim_s: float) -> bool:
        """False when the claim was lost, or the job does not wait for its work any more."""
        status = await _QUERIES.renew_claim(self._connection, **_key(job), claim_s=claim_s)
        return affected(status) > 0

    async def free(self, job: Claim) -> None:
        await _QUERIES.free_claim(self._connection, **_key(job))

    async def postpone(self, job: Claim, *, delay_s: float, waiting_message: str, now: datetime) -> bool:
        """Gives the claim back until later; False when it was lost."""
        status = await _QUERIES.postpone_job(
            self._connection, **_key(job), delay_s=delay_s, waiting_message=waiting_message, now=now
        )
        return affected(status) > 0

    async def request_hold(self, job: Claim) -> bool:
        """Records, before billing is asked, that a hold may exist from now on; False when the claim was lost."""
        return affected(await _QUERIES.request_hold(self._connection, **_key(job))) > 0

    async def finish_release(self, job: Claim) -> None:
        await _QUERIES.finish_release(self._connection, **_key(job))

    async def list_fates(self, refs: Sequence[JobRef]) -> dict[JobRef, bool]:
        """Of each job that exists: whether it ended and the bus has all events about it."""
        rows = _QUERIES.list_fates(
            self._connection,
            project_ids=[ref.project_id for ref in refs],
            job_ids=[ref.job_id for ref in refs],
        )
        return {JobRef(project_id=row["project_id"], job_id=row["job_id"]): row["is_told"] async for row in rows}

    async def list_holding(self, after_job_id: str, page_size: int) -> list[JobRef]:
        """Unfinished jobs whose price is held, by id."""
        rows = _QUERIES.list_holding(self._connection, after_job_id=after_job_id, page_size=page_size)
        return [JobRef(**row) async for row in rows]


class HistoryStore:
    """What is kept of jobs that ended."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def lock_oldest(self, stage: int, before: datetime, left_alone: Sequence[str]) -> str | None:
        """The job at this stage that ended first, and before then, but none of `left_alone`; None when there is
        none."""
        job_id: str | None = await _QUERIES.lock_old_history(
            self._connection, stage=stage, before=before, left_alone=list(left_alone)
        )
        return job_id

    async def prune_lines(self, job_id: str, kinds: Sequence[EventKind], batch_max: int) -> int:
        status = await _QUERIES.prune_history(
            self._connection, job_id=job_id, kinds=[kind.value for kind in kinds], batch_max=batch_max
        )
        return affected(status)

    async def prune_usage(self, job_id: str, batch_max: int) -> int:
        return affected(await _QUERIES.prune_job_usage(self._connection, job_id=job_id, batch_max=batch_max))

    async def prune_checkpoints(self, job_id: str, batch_max: int) -> int:
        """Those that were given up."""
        return affected(await _QUERIES.prune_checkpoints(self._connection, job_id=job_id, batch_max=batch_max))

    async def prune_attempts(self, job_id: str, batch_max: int) -> int:
        """With their leases."""
        return affected(await _QUERIES.prune_attempts(self._connection, job_id=job_id, batch_max=batch_max))

    async def finish(self, job_id: str, stage: int) -> None:
        await _QUERIES.finish_history(self._connection, job_id=job_id, stage=stage)


def _key(job: Claim) -> dict[str, object]:
    return {"project_id": job.project_id, "job_id": job.job_id, "claim": job.claim}
