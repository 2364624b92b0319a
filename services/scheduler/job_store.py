"""Jobs in the database: reads, and transitions that are one guarded UPDATE with its event in the same transaction.

What may follow what is the lifecycle's table; a transition that finds no row returns None and changed nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import asyncpg

from chassis.db.pool import Connection, Pool
from services.scheduler import events
from services.scheduler.convert import job_name
from services.scheduler.domain import (
    Ending,
    EventKind,
    Job,
    JobEvent,
    JobRef,
    NewJob,
    StoredCheckpoint,
    Transitioned,
)
from services.scheduler.lifecycle import INITIAL, TABLE, JobState, JobTransition
from services.scheduler.store import QUERIES, QUEUE_TOPIC, Store, job_topic, notify

_GET_JOB: str = QUERIES.get_job.sql

_UPDATES: Mapping[JobTransition, Callable[..., Any]] = {
    JobTransition.HELD: QUERIES.hold_job,
    JobTransition.REFUSE: QUERIES.refuse_job,
    JobTransition.PLACE: QUERIES.place_job,
    JobTransition.START: QUERIES.start_job,
    JobTransition.SUCCEED: QUERIES.succeed_job,
    JobTransition.FAIL: QUERIES.fail_job,
    JobTransition.EXPIRE: QUERIES.expire_job,
    JobTransition.REQUEUE: QUERIES.requeue_job,
    JobTransition.CANCEL_WAITING: QUERIES.cancel_waiting_job,
    JobTransition.CANCEL_RUNNING: QUERIES.cancel_running_job,
    JobTransition.STOP: QUERIES.stop_job,
}


async def get_job(pool: Pool, ref: JobRef) -> Job | None:
    """The hot read: one prepared statement, straight to the row."""
    row = await pool.fetchrow(_GET_JOB, ref.job_id, ref.project_id)
    return None if row is None else _job(row)


async def get_job_by_request(pool: Pool, project_id: str, request_id: str) -> tuple[str, str] | None:
    """Job id and request digest."""
    row = await QUERIES.get_job_by_request(pool, project_id=project_id, request_id=request_id)
    return None if row is None else (row["job_id"], row["request_sha256"])


async def list_jobs(pool: Pool, project_id: str, before_job_id: str, page_size: int) -> list[Job]:
    rows = QUERIES.list_jobs(pool, project_id=project_id, before_job_id=before_job_id, page_size=page_size)
    return [_job(row) async for row in rows]


async def list_job_events(pool: Pool, ref: JobRef, after_sequence: int, page_size: int) -> list[JobEvent]:
    rows = QUERIES.list_job_events(
        pool, project_id=ref.project_id, job_id=ref.job_id, after_sequence=after_sequence, page_size=page_size
    )
    return [
        JobEvent(
            sequence=row["sequence"],
            event_time=row["event_time"],
            kind=EventKind(row["kind"]),
            message=row["message"],
            state=JobState(row["state"]),
            progress=row["progress"],
        )
        async for row in rows
    ]


async def list_checkpoints(pool: Pool, ref: JobRef, after_step: int, page_size: int) -> list[StoredCheckpoint]:
    rows = QUERIES.list_checkpoints(
        pool, project_id=ref.project_id, job_id=ref.job_id, after_step=after_step, page_size=page_size
    )
    return [StoredCheckpoint(**row) async for row in rows]


async def queue_positions(pool: Pool, job_ids: Sequence[str]) -> dict[str, int]:
    return {row["job_id"]: row["position"] async for row in QUERIES.queue_positions(pool, job_ids=list(job_ids))}


async def list_holding(pool: Pool, after_job_id: str, page_size: int) -> list[JobRef]:
    """Unfinished jobs whose price is held, by id."""
    return [JobRef(**row) async for row in QUERIES.list_holding(pool, after_job_id=after_job_id, page_size=page_size)]


async def list_remaining_s(pool: Pool, now: datetime, page_size: int) -> list[float]:
    """What running jobs still need, less the time since they said so."""
    return [
        max(0.0, row["remaining_s"] - (now - row["progress_time"]).total_seconds())
        async for row in QUERIES.list_remaining(pool, page_size=page_size)
    ]


class JobStore:
    """The writes. All take a connection inside the caller's transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(self, connection: Connection, job: NewJob) -> None:
        """asyncpg.UniqueViolationError names the index when the request id or the output name is taken."""
        now = self._store.now()
        await QUERIES.insert_job(connection, **vars(job), state=INITIAL.value, now=now)
        message = "acknowledged; the dataset will be analysed and priced"
        ref = JobRef(project_id=job.project_id, job_id=job.job_id)
        await self._log(connection, ref, 1, EventKind.STATE_CHANGED, message, INITIAL)
        event = events.job_created(job.project_id, job.job_id, job.organization_id, INITIAL.value, now)
        await self._store.outbox.add(connection, event, subject_name=event.tuning_job)
        await notify(connection, QUEUE_TOPIC, job_topic(job.job_id))

    async def transition(
        self,
        connection: Connection,
        transition: JobTransition,
        ref: JobRef,
        message: str,
        *,
        kind: EventKind = EventKind.STATE_CHANGED,
        **values: object,
    ) -> Transitioned | None:
        """`values` are what this transition's UPDATE sets or is guarded by besides the state."""
        now = self._store.now()
        rule = TABLE[transition]
        row = await _UPDATES[transition](
            connection,
            project_id=ref.project_id,
            job_id=ref.job_id,
            sources=[source.value for source in rule.sources],
            destination=rule.destination.value,
            now=now,
            **values,
        )
        if row is None:
            return None
        change = _transitioned(row)
        await self._log(connection, ref, change.sequence, kind, message, change.to_state)
        event = events.job_state_changed(change, now)
        await self._store.outbox.add(connection, event, subject_name=event.tuning_job)
        await notify(connection, job_topic(ref.job_id), QUEUE_TOPIC)
        return change

    async def end(
        self, connection: Connection, change: Transitioned, ending: Ending, model: events.Model | None = None
    ) -> None:
        """Tells, once per job, that nothing more will be metered for it, and forgets its secrets; in the transaction of
        the final transition."""
        await QUERIES.delete_job_secrets(connection, project_id=change.project_id, job_id=change.job_id)
        count = await QUERIES.count_usage(connection, project_id=change.project_id, job_id=change.job_id)
        event = events.job_ended(change, ending, count, model, self._store.now())
        await self._store.outbox.add(connection, event, subject_name=event.tuning_job, key=change.job_id)

    async def add_lines(
        self,
        connection: Connection,
        ref: JobRef,
        state: JobState,
        lines: Sequence[tuple[EventKind, str, bytes | None]],
    ) -> None:
        """Lines of the history beside a transition: kind, words, and the encoded TuningProgress if there is one."""
        if not lines:
            return
        now = self._store.now()
        last = await QUERIES.take_sequences(
            connection, project_id=ref.project_id, job_id=ref.job_id, count=len(lines), now=now
        )
        await QUERIES.add_job_events(
            connection,
            project_id=ref.project_id,
            job_id=ref.job_id,
            sequences=list(range(last - len(lines) + 1, last + 1)),
            now=now,
            kinds=[kind.value for kind, _, _ in lines],
            messages=[message for _, message, _ in lines],
            state=state.value,
            progresses=[progress for _, _, progress in lines],
        )
        await notify(connection, job_topic(ref.job_id))

    async def _log(
        self, connection: Connection, ref: JobRef, sequence: int, kind: EventKind, message: str, state: JobState
    ) -> None:
        await QUERIES.add_job_event(
            connection,
            project_id=ref.project_id,
            job_id=ref.job_id,
            sequence=sequence,
            now=self._store.now(),
            kind=kind.value,
            message=message,
            state=state.value,
            progress=None,
        )


def resource_name(ref: JobRef) -> str:
    return job_name(ref.project_id, ref.job_id)


def _job(row: asyncpg.Record) -> Job:
    values = dict(row)
    values["state"] = JobState(values["state"])
    return Job(**values)


def _transitioned(row: asyncpg.Record) -> Transitioned:
    values = dict(row)
    values["from_state"] = JobState(values["from_state"])
    values["to_state"] = JobState(values["to_state"])
    return Transitioned(**values)
