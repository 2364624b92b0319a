"""Attempts in the database, and what they report: progress, usage, checkpoints.

Every write of a report is guarded by the lease's token.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import asyncpg

from chassis.db.pool import Connection, Pool
from chassis.db.queries import load_queries
from services.scheduler.attempts.attempt import (
    AttemptOutcome,
    BadCheckpoint,
    Committed,
    Lease,
    LeasedJob,
    MarkedBad,
    NewCheckpoint,
    Usage,
)
from services.scheduler.attempts.progress import Metric
from services.scheduler.jobs.job import JobRef, LeaseRef
from services.scheduler.jobs.lifecycle import REPORTING, JobState

_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))
_REPORTING = [state.value for state in REPORTING]
MESSAGE_CHARS_MAX = 1000


class AttemptStore:
    def __init__(self, connection: "Connection | Pool") -> None:
        self._connection = connection

    async def insert(self, ref: LeaseRef, attempt: int, node: str, incarnation: str) -> None:
        await _QUERIES.insert_attempt(
            self._connection, **vars(ref), attempt=attempt, node=node, incarnation=incarnation
        )

    async def lock_leased_job(self, ref: LeaseRef) -> LeasedJob | None:
        """The job if `ref` holds its lease, locked until the end of the transaction; an old token finds nothing."""
        row = await _QUERIES.lock_leased_job(self._connection, **vars(ref))
        return None if row is None else LeasedJob(**{**row, "state": JobState(row["state"])})

    async def lease_of(self, ref: JobRef) -> LeaseRef | None:
        """The lease that is in force for the job now."""
        token = await _QUERIES.get_lease_token(self._connection, project_id=ref.project_id, job_id=ref.job_id)
        if token is None:
            return None
        return LeaseRef(project_id=ref.project_id, job_id=ref.job_id, lease_token=token)

    async def node_of(self, ref: JobRef) -> str | None:
        """The node that has the job now."""
        node: str | None = await _QUERIES.get_leased_node(
            self._connection, project_id=ref.project_id, job_id=ref.job_id
        )
        return node

    async def leading(self, ref: LeaseRef) -> LeaseRef:
        """The lease of the attempt that a node of a gang works on; any other lease as it is."""
        token: int | None = await _QUERIES.get_leader_token(self._connection, **vars(ref))
        return ref if token is None else replace(ref, lease_token=token)

    async def outcome(self, ref: LeaseRef) -> AttemptOutcome | None:
        outcome = await _QUERIES.get_attempt_outcome(self._connection, **vars(ref))
        return None if outcome is None else AttemptOutcome(outcome)

    async def end(self, ref: LeaseRef, outcome: AttemptOutcome, message: str, *, blames_node: bool) -> None:
        await _QUERIES.end_attempt(
            self._connection,
            lease_token=ref.lease_token,
            outcome=outcome.value,
            message=message[:MESSAGE_CHARS_MAX],
            blames_node=blames_node,
        )

    async def list_expired(self, at: datetime, page_size: int) -> list[Lease]:
        """Allocations whose time was over at a time of the database, those that serve included."""
        rows = _QUERIES.list_expired(self._connection, at=at, page_size=page_size)
        return [_lease(row) async for row in rows]

    async def list_of_node(self, node: str) -> list[Lease]:
        """The leases of training on a node, whether their time is over or not."""
        return [_lease(row) async for row in _QUERIES.list_node_leases(self._connection, node=node)]

    async def touch_start(self, ref: LeaseRef, start_weights: bytes | None, now: datetime) -> None:
        """An attempt that started although it was cancelled has run; all later ones start from these weights, too."""
        await _QUERIES.touch_start(self._connection, **vars(ref), start_weights=start_weights, now=now)

    async def start_weights(self, ref: LeaseRef) -> bytes | None:
        """An encoded finemesh.nodes.v1.StartWeights; None for a run that starts afresh."""
        weights: bytes | None = await _QUERIES.get_start_weights(self._connection, **vars(ref))
        return weights

    async def record_progress(self, ref: LeaseRef, metric: Metric, now: datetime, *, lines: int) -> int:
        """In the same write of the job's row, takes the numbers of that many lines of its history; returns the last."""
        last: int = await _QUERIES.record_progress(
            self._connection,
            **vars(ref),
            states=_REPORTING,
            progress=metric.encoded,
            step=metric.step,
            remaining_s=metric.remaining_s,
            lines=lines,
            now=now,
        )
        return last

    async def known_warnings(self, ref: LeaseRef, messages: Sequence[str]) -> set[str]:
        """Those of the messages that the job's history holds already."""
        rows = _QUERIES.list_known_warnings(
            self._connection, project_id=ref.project_id, job_id=ref.job_id, messages=list(messages)
        )
        return {row["message"] async for row in rows}

    async def record_usage(self, ref: LeaseRef, usage: Usage, now: datetime) -> bool:
        """False when this work, or a part of it, was recorded before."""
        recorded = await _QUERIES.record_usage(
            self._connection, **vars(ref), **vars(usage), work_key=usage.work_key(ref.job_id), now=now
        )
        return recorded is not None

    async def recorded_tokens(self, ref: LeaseRef, work_key: str) -> int | None:
        tokens: int | None = await _QUERIES.get_usage_tokens(
            self._connection, project_id=ref.project_id, job_id=ref.job_id, work_key=work_key
        )
        return tokens

    async def insert_checkpoint(self, ref: LeaseRef, checkpoint: NewCheckpoint, now: datetime) -> Committed | None:
        """None when the step has a checkpoint already; that one stays."""
        row = await _QUERIES.insert_checkpoint(self._connection, **vars(ref), **vars(checkpoint), now=now)
        return None if row is None else Committed(given_up=row["given_up"])

    async def mark_bad(self, ref: LeaseRef, bad: BadCheckpoint, reason: str, now: datetime) -> MarkedBad | None:
        """None when it is not the checkpoint that the job goes on from."""
        row = await _QUERIES.mark_checkpoint_bad(
            self._connection, project_id=ref.project_id, job_id=ref.job_id, **vars(bad), reason=reason, now=now
        )
        return None if row is None else MarkedBad(**row)

    async def committed_artifact(self, ref: LeaseRef, step: int) -> bytes | None:
        artifact: bytes | None = await _QUERIES.get_checkpoint_artifact(
            self._connection, project_id=ref.project_id, job_id=ref.job_id, step=step
        )
        return artifact

    async def forget_failures(self, ref: LeaseRef, now: datetime, *, lines: int) -> int:
        """As `record_progress`, for a new checkpoint."""
        last: int = await _QUERIES.forget_failures(self._connection, **vars(ref), lines=lines, now=now)
        return last

    async def retire_checkpoints(self, ref: LeaseRef, kept: int, now: datetime) -> None:
        await _QUERIES.retire_checkpoints(
            self._connection, project_id=ref.project_id, job_id=ref.job_id, kept=kept, now=now
        )

    async def list_obsolete(self, ref: LeaseRef, page_size: int) -> list[bytes]:
        """Encoded artifacts of checkpoints that are no longer needed, the newest first."""
        rows = _QUERIES.list_obsolete(
            self._connection, project_id=ref.project_id, job_id=ref.job_id, page_size=page_size
        )
        return [row["artifact"] async for row in rows]


def _lease(row: asyncpg.Record) -> Lease:
    ref = None
    if row["job_id"] is not None:
        ref = LeaseRef(project_id=row["project_id"], job_id=row["job_id"], lease_token=row["attempt_token"])
    return Lease(lease_token=row["lease_token"], owner=row["owner"], ref=ref)
