"""Not pure: database, outbox. What an attempt reports while it lives: its start, progress, usage and checkpoints.

Every report is one transaction, fenced by the lease's token; what was recorded before is left as it is.
"""

from collections.abc import Sequence

import structlog

from chassis.db.pool import Connection
from services.scheduler.attempts import fence
from services.scheduler.attempts.attempt import LeasedJob, NewCheckpoint, Usage
from services.scheduler.attempts.convert import pin_start, usage_to_proto
from services.scheduler.attempts.progress import Known, Metric, in_words, kinds, news
from services.scheduler.attempts.store import AttemptStore
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.job import EventKind, LeaseRef
from services.scheduler.jobs.lifecycle import REPORTING, JobState, JobTransition
from services.scheduler.jobs.transitions import JobTransitions

log = structlog.get_logger(__name__)


class AttemptReports:
    def __init__(self, database: Database, jobs: JobTransitions, settings: SchedulerSettings) -> None:
        self._database = database
        self._jobs = jobs
        self._settings = settings

    async def start(self, ref: LeaseRef, hub_commit: str = "") -> None:
        """`hub_commit` is what the attempt found in the hub; all later attempts start from it, too."""
        async with self._database.writing() as connection:
            job = await fence.lock(connection, ref)
            attempts = AttemptStore(connection)
            pinned = pin_start(await attempts.start_weights(ref), hub_commit) if hub_commit else None
            if job.state is JobState.STARTING:
                message = f"attempt {job.attempt_count} runs on {job.node}"
                await self._jobs.must(
                    connection, JobTransition.START, ref, message, lease_token=ref.lease_token, start_weights=pinned
                )
            elif job.state is JobState.CANCELLING or pinned is not None:
                await attempts.touch_start(ref, pinned, self._database.now())

    async def report(
        self, ref: LeaseRef, metrics: Sequence[Metric], usage: Sequence[Usage], warnings: Sequence[str]
    ) -> None:
        """Progress, usage and warnings in one transaction."""
        async with self._database.writing() as connection:
            job = await fence.lock(connection, ref, *REPORTING)
            attempts = AttemptStore(connection)
            known = None
            if job.progress_token == ref.lease_token and job.progress is not None and job.progress_step is not None:
                known = Known(step=job.progress_step, encoded=job.progress)
            fresh = news(metrics, known)
            lines: list[tuple[EventKind, str, bytes | None]] = [
                (kind, in_words(metric, kind), metric.encoded)
                for metric, kind in zip(fresh, kinds(fresh, known), strict=True)
            ]
            if warnings:
                told = await attempts.known_warnings(ref, warnings)
                lines = [
                    *((EventKind.WARNING, warning, None) for warning in dict.fromkeys(warnings) if warning not in told),
                    *lines,
                ]
            last = None
            if fresh:
                last = await attempts.record_progress(ref, fresh[-1], self._database.now(), lines=len(lines))
            await self._jobs.add_lines(connection, ref, job.state, lines, last=last)
            for piece in usage:
                await self._meter(connection, ref, job, piece)

    async def commit(self, ref: LeaseRef, checkpoint: NewCheckpoint) -> list[bytes]:
        """Registers an uploaded checkpoint; returns encoded artifacts whose files may be deleted."""
        now = self._database.now()
        async with self._database.writing() as connection:
            job = await fence.lock(connection, ref, *REPORTING)
            attempts = AttemptStore(connection)
            committed = await attempts.insert_checkpoint(ref, checkpoint, now)
            if committed is not None:
                # Steps that were saved before are no progress: a job whose checkpoints are bad each time ends some day.
                last = None
                if committed.given_up is None:
                    last = await attempts.forget_failures(ref, now, lines=1)
                await attempts.retire_checkpoints(ref, self._settings.checkpoints_kept_max, now)
                message = f"checkpoint after step {checkpoint.step} committed"
                line = (EventKind.CHECKPOINT, message, None)
                await self._jobs.add_lines(connection, ref, job.state, [line], last=last)
            obsolete = await attempts.list_obsolete(ref, self._settings.obsolete_batch_max)
            if committed is not None and committed.given_up is not None:
                obsolete.append(committed.given_up)
            kept = await attempts.committed_artifact(ref, checkpoint.step)
        # Two attempts may have uploaded the same step; the one that was committed first is the checkpoint.
        return obsolete if kept == checkpoint.artifact else [*obsolete, checkpoint.artifact]

    async def _meter(self, connection: Connection, ref: LeaseRef, job: LeasedJob, usage: Usage) -> None:
        """Records work once, with its event; the first record of a piece of work is the one that counts."""
        now, attempts = self._database.now(), AttemptStore(connection)
        key = usage.work_key(ref.job_id)
        if await attempts.record_usage(ref, usage, now):
            event = usage_to_proto(ref, job.organization_id, usage, now)
            await self._database.outbox.add(connection, event, subject_name=event.tuning_job, key=key)
            return
        first = await attempts.recorded_tokens(ref, key)
        if first is None:
            log.error("usage_overlaps_billed_steps", work_key=key, tokens=usage.tokens, detail="it is ignored")
        elif first != usage.tokens:
            log.warning("usage_first_count_stays", work_key=key, first=first, redone=usage.tokens)
