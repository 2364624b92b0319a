"""Jobs in the database: their rows, the lines of their history, and the one guarded UPDATE that moves them."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TypedDict, Unpack
from uuid import UUID

import asyncpg

from chassis.db.pool import Connection, Pool
from chassis.db.queries import load_queries
from services.scheduler.jobs.job import (
    EventKind,
    Job,
    JobEvent,
    JobRef,
    LeaseRef,
    NewJob,
    QueuedJob,
    StoredCheckpoint,
    Transitioned,
)
from services.scheduler.jobs.lifecycle import FINAL, INITIAL, LEASED, TABLE, Guard, JobState, JobTransition

_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))
_GET_JOB: str = _QUERIES.get_job.sql


class Changes(TypedDict, total=False):
    """What a transition is guarded by, `claim` or `lease_token`, and what it sets besides the state.

    The job wakes at once when `wake_delay_s` is left out; every other column stays as it is. `placed_token` begins the
    next attempt. `lines_before` takes as many numbers of the history for lines before that of the transition.
    """

    claim: UUID
    lease_token: int
    placed_token: int
    counts: bytes
    outlook: bytes | None
    quoted_nanos_usd: int
    price_book_version: str
    hold_id: str
    error: bytes
    output_revision: str
    output_artifact: bytes
    wake_delay_s: float
    failure_count: int
    start_weights: bytes | None
    lines_before: int


_NO_CHANGES = dict.fromkeys(Changes.__annotations__)


class JobStore:
    def __init__(self, connection: "Connection | Pool") -> None:
        self._connection = connection

    async def get(self, ref: JobRef) -> Job | None:
        """The hot read: one prepared statement, straight to the row."""
        row = await self._connection.fetchrow(_GET_JOB, ref.job_id, ref.project_id)
        return None if row is None else _job(row)

    async def get_by_request(self, project_id: str, request_id: str) -> tuple[str, str] | None:
        """Job id and request digest."""
        row = await _QUERIES.get_job_by_request(self._connection, project_id=project_id, request_id=request_id)
        return None if row is None else (row["job_id"], row["request_sha256"])

    async def list_jobs(self, project_id: str, before_job_id: str, page_size: int) -> list[Job]:
        rows = _QUERIES.list_jobs(
            self._connection, project_id=project_id, before_job_id=before_job_id, page_size=page_size
        )
        return [_job(row) async for row in rows]

    async def list_events(self, ref: JobRef, after_sequence: int, page_size: int) -> list[JobEvent]:
        rows = _QUERIES.list_job_events(
            self._connection,
            project_id=ref.project_id,
            job_id=ref.job_id,
            after_sequence=after_sequence,
            page_size=page_size,
        )
        return [
            JobEvent(**{**row, "kind": EventKind(row["kind"]), "state": JobState(row["state"])}) async for row in rows
        ]

    async def list_checkpoints(self, ref: JobRef, after_step: int, page_size: int) -> list[StoredCheckpoint]:
        rows = _QUERIES.list_checkpoints(
            self._connection,
            project_id=ref.project_id,
            job_id=ref.job_id,
            after_step=after_step,
            page_size=page_size,
        )
        return [StoredCheckpoint(**row) async for row in rows]

    async def files_in_use(self, keys: Sequence[str]) -> list[str]:
        """Those of these keys of the artifact store that jobs which have not ended read."""
        rows = _QUERIES.list_files_in_use(self._connection, keys=[*keys])
        return [row["key"] async for row in rows]

    async def queue_times(self) -> list[float]:
        """When each queued job came, in order, as `datetime.timestamp()` has it."""
        times: list[float] = await _QUERIES.list_queue_times(self._connection)
        return times

    async def row_versions(self, job_ids: Sequence[str]) -> dict[JobRef, int]:
        """What changes whenever the row of a job does; jobs that are not there are left out."""
        rows = _QUERIES.list_row_versions(self._connection, job_ids=[*job_ids])
        return {JobRef(project_id=row["project_id"], job_id=row["job_id"]): row["row_version"] async for row in rows}

    async def list_queued(self, after: QueuedJob | None, page_size: int) -> list[QueuedJob]:
        """Jobs that may start now, in order of arrival, after that one."""
        return [
            QueuedJob(
                ref=JobRef(project_id=row["project_id"], job_id=row["job_id"]),
                gpu_count=row["gpu_count"],
                memory_bytes_min=row["memory_bytes_min"],
                failed_nodes=frozenset(row["failed_nodes"]),
                queue_time=row["queue_time"],
            )
            async for row in _QUERIES.list_queued(
                self._connection,
                after_time=after.queue_time if after else None,
                after_job_id=after.ref.job_id if after else "",
                page_size=page_size,
            )
        ]

    async def failed_nodes(self, job_ids: Sequence[str]) -> dict[str, frozenset[str]]:
        """The nodes on which attempts at these jobs failed, by job."""
        found: dict[str, set[str]] = {job_id: set() for job_id in job_ids}
        async for row in _QUERIES.list_failed_nodes(self._connection, job_ids=[*job_ids]):
            found[row["job_id"]].add(row["node"])
        return {job_id: frozenset(nodes) for job_id, nodes in found.items()}

    async def end_pauses(self, claim_s: float) -> None:
        """After the database's clock was set: what was written by it may wait for hours that nobody meant."""
        await _QUERIES.end_pauses(self._connection, claim_s=claim_s)

    async def list_remaining_s(self) -> list[float]:
        """What running jobs still need, less the time since they said so; the shortest first."""
        return [row["remaining_s"] async for row in _QUERIES.list_remaining(self._connection)]

    async def insert(self, job: NewJob, now: datetime) -> None:
        """asyncpg.UniqueViolationError names the index when the request id or the output name is taken."""
        await _QUERIES.insert_job(self._connection, **vars(job), state=INITIAL.value, now=now)

    async def transition(
        self, transition: JobTransition, ref: JobRef, now: datetime, **changes: Unpack[Changes]
    ) -> Transitioned | None:
        """None when the job's state does not allow it, or when its guard is not in force: then nothing has changed."""
        rule = TABLE[transition]
        given = Guard.CLAIM if "claim" in changes else Guard.LEASE if "lease_token" in changes else Guard.STATE
        if given is not rule.guard:
            raise ValueError(f"{transition} is guarded by the {rule.guard}, not by the {given}")
        row = await _QUERIES.transition_job(
            self._connection,
            project_id=ref.project_id,
            job_id=ref.job_id,
            sources=[source.value for source in rule.sources],
            destination=rule.destination.value,
            now=now,
            leased=rule.destination in LEASED,
            final=rule.destination in FINAL,
            **{**_NO_CHANGES, **changes},
        )
        if row is None:
            return None
        return Transitioned(**{**row, "from_state": JobState(row["from_state"]), "to_state": JobState(row["to_state"])})

    async def add_event(
        self, ref: JobRef, sequence: int, kind: EventKind, message: str, state: JobState, now: datetime
    ) -> None:
        """One line of the history, whose number the job's row gave out before."""
        await _QUERIES.add_job_event(
            self._connection,
            project_id=ref.project_id,
            job_id=ref.job_id,
            sequence=sequence,
            now=now,
            kind=kind.value,
            message=message,
            state=state.value,
            progress=None,
        )

    async def take_sequences(self, ref: JobRef, count: int, now: datetime) -> int:
        """The last of the next `count` numbers of a job's history."""
        last: int = await _QUERIES.take_sequences(
            self._connection, project_id=ref.project_id, job_id=ref.job_id, count=count, now=now
        )
        return last

    async def add_events(
        self,
        ref: JobRef,
        state: JobState,
        lines: Sequence[tuple[EventKind, str, bytes | None]],
        now: datetime,
        *,
        last: int,
    ) -> None:
        """Several lines at once, whose numbers end with `last`: kind, words, and the encoded TuningProgress if there is
        one."""
        await _QUERIES.add_job_events(
            self._connection,
            project_id=ref.project_id,
            job_id=ref.job_id,
            sequences=[*range(last - len(lines) + 1, last + 1)],
            now=now,
            kinds=[kind.value for kind, _, _ in lines],
            messages=[message for _, message, _ in lines],
            state=state.value,
            progresses=[progress for _, _, progress in lines],
        )

    async def count_usage(self, ref: JobRef) -> int:
        count: int = await _QUERIES.count_usage(self._connection, project_id=ref.project_id, job_id=ref.job_id)
        return count

    async def insert_folder(self, ref: JobRef) -> None:
        """The job's folder in the artifact store is to be cleaned."""
        await _QUERIES.insert_folder(self._connection, project_id=ref.project_id, job_id=ref.job_id)

    async def insert_secrets(self, ref: JobRef, sealed: bytes, now: datetime) -> None:
        await _QUERIES.insert_job_secrets(
            self._connection, project_id=ref.project_id, job_id=ref.job_id, sealed=sealed, now=now
        )

    async def get_secrets(self, ref: LeaseRef) -> tuple[bytes | None] | None:
        """The sealed secrets of the job whose lease this is, if it has any; None for a lease that is not in force."""
        row = await _QUERIES.get_job_secrets(
            self._connection, project_id=ref.project_id, job_id=ref.job_id, lease_token=ref.lease_token
        )
        return None if row is None else (row["sealed"],)

    async def delete_secrets(self, ref: JobRef) -> None:
        await _QUERIES.delete_job_secrets(self._connection, project_id=ref.project_id, job_id=ref.job_id)


def _job(row: asyncpg.Record) -> Job:
    values = dict(row)
    values["state"] = JobState(values["state"])
    return Job(**values)
