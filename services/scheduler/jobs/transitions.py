"""Not pure: database, outbox. What happens to jobs: each change with its line of history and its event.

Everything is written in the caller's transaction. What may follow what is the lifecycle's table.
"""

from collections.abc import Sequence
from typing import Unpack

from chassis.db.pool import Connection
from chassis.errors import FailedPrecondition
from services.scheduler.database import Database
from services.scheduler.jobs.convert import ending_to_proto, new_job_to_proto, transition_to_proto
from services.scheduler.jobs.endings import Ending
from services.scheduler.jobs.job import EventKind, JobRef, LeaseRef, NewJob, Transitioned, TunedModel
from services.scheduler.jobs.lifecycle import INITIAL, MOVES_QUEUE, JobState, JobTransition
from services.scheduler.jobs.store import Changes, JobStore
from services.scheduler.watching.hub import QUEUE_TOPIC, job_topic

# A line of the history: kind, words, and the encoded TuningProgress if there is one.
Line = tuple[EventKind, str, bytes | None]


class JobTransitions:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, connection: Connection, job: NewJob) -> None:
        """asyncpg.UniqueViolationError names the index when the request id or the output name is taken."""
        now, store = self._database.now(), JobStore(connection)
        await store.insert(job, now)
        message = "acknowledged; the dataset will be analysed and priced"
        await store.add_event(job, 1, EventKind.STATE_CHANGED, message, INITIAL, now)
        event = new_job_to_proto(job, now)
        await self._database.outbox.add(connection, event, subject_name=event.tuning_job)
        self._database.ring(QUEUE_TOPIC, job_topic(job.job_id))

    async def transition(
        self,
        connection: Connection,
        transition: JobTransition,
        ref: JobRef,
        message: str,
        *,
        kind: EventKind = EventKind.STATE_CHANGED,
        before: Sequence[Line] = (),
        **changes: Unpack[Changes],
    ) -> Transitioned | None:
        """None when the job's state, claim or lease does not allow it: then nothing has changed.

        `before` are lines that the history shows before that of the transition; the row is written once for all.
        """
        now, store = self._database.now(), JobStore(connection)
        if before:
            changes["lines_before"] = len(before)
        change = await store.transition(transition, ref, now, **changes)
        if change is None:
            return None
        if before:
            await store.add_events(ref, change.from_state, before, now, last=change.sequence - 1)
        await store.add_event(ref, change.sequence, kind, message, change.to_state, now)
        event = transition_to_proto(change, now)
        await self._database.outbox.add(connection, event, subject_name=event.tuning_job)
        topics = [job_topic(ref.job_id), QUEUE_TOPIC] if transition in MOVES_QUEUE else [job_topic(ref.job_id)]
        self._database.ring(*topics)
        return change

    async def must(
        self,
        connection: Connection,
        transition: JobTransition,
        ref: LeaseRef,
        message: str,
        *,
        kind: EventKind = EventKind.STATE_CHANGED,
        before: Sequence[Line] = (),
        **changes: Unpack[Changes],
    ) -> Transitioned:
        """As `transition`, for a job that the caller locked; FailedPrecondition when its state does not allow it."""
        change = await self.transition(connection, transition, ref, message, kind=kind, before=before, **changes)
        if change is None:
            raise FailedPrecondition("STATE_CONFLICT", f"the job's state does not allow {transition}")
        return change

    async def end(
        self, connection: Connection, change: Transitioned, ending: Ending, model: TunedModel | None = None
    ) -> None:
        """Tells, once per job, that nothing more will be metered for it, forgets its secrets and has its files cleaned;
        in the transaction of the final transition."""
        store = JobStore(connection)
        await store.delete_secrets(change)
        if change.attempt_count:
            await store.insert_folder(change)
        count = await store.count_usage(change)
        event = ending_to_proto(change, ending, count, model, self._database.now())
        await self._database.outbox.add(connection, event, subject_name=event.tuning_job, key=change.job_id)

    async def add_lines(
        self,
        connection: Connection,
        ref: JobRef,
        state: JobState,
        lines: Sequence[Line],
        *,
        last: int | None = None,
    ) -> None:
        """Lines of the history beside a transition.

        `last` is the number of the last one, where a write of the job's row took them already.
        """
        if lines:
            store, now = JobStore(connection), self._database.now()
            if last is None:
                last = await store.take_sequences(ref, len(lines), now)
            await store.add_events(ref, state, lines, now, last=last)
            self._database.tell(job_topic(ref.job_id))
