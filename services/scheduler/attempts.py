"""The life of one attempt at a job, from its lease to its end. Every step is one transaction, fenced by the lease's token.

It decides what a report means for the job; the lifecycle's table decides whether that is allowed, the SQL whether the
token still holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from chassis.db.pool import Connection
from chassis.errors import Aborted, FailedPrecondition
from services.scheduler import events, lease_store, leases, report_store
from services.scheduler.config import SchedulerSettings
from services.scheduler.convert import failure_to
from services.scheduler.domain import (
    AttemptOutcome,
    Ending,
    EventKind,
    JobFailure,
    JobRef,
    LeasedJob,
    LeaseRef,
    Transitioned,
    Usage,
)
from services.scheduler.job_store import JobStore, resource_name
from services.scheduler.lifecycle import REPORTING, JobState, JobTransition
from services.scheduler.progress import Known, Metric, in_words, kinds, news
from services.scheduler.store import Store, node_topic, notify

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What a successful attempt made; `artifact` is an encoded finemesh.artifacts.v1.Artifact."""

    revision: str
    kind: str
    adapter_rank: int
    lineage: dict[str, str]
    artifact: bytes
    stopped_early: bool = False
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class NewCheckpoint:
    step: int
    manifest_sha256: str
    size_bytes: int
    artifact: bytes
    asked: bool = False


class Attempts:
    def __init__(self, store: Store, jobs: JobStore, settings: SchedulerSettings) -> None:
        self._store = store
        self._jobs = jobs
        self._settings = settings

    async def start(self, ref: LeaseRef, hub_commit: str = "") -> None:
        """`hub_commit` is what the attempt found in the hub; all later ones start from it, too."""
        async with self._store.writing() as connection:
            job = await self._lock(connection, ref)
            if hub_commit:
                await report_store.pin_start(connection, ref, hub_commit)
            if job.state is JobState.CANCELLING:
                await report_store.touch_start(connection, ref, self._store.now())
            elif job.state is JobState.STARTING:
                message = f"attempt {job.attempt_count} runs on {job.node}"
                await self._must(connection, JobTransition.START, ref, message, lease_token=ref.lease_token)

    async def report(
        self, ref: LeaseRef, metrics: Sequence[Metric], usage: Sequence[Usage], warnings: Sequence[str]
    ) -> None:
        """Progress, usage and warnings in one transaction; what was recorded before is left as it is."""
        async with self._store.writing() as connection:
            job = await self._lock(connection, ref, *REPORTING)
            known = None
            if job.progress_token == ref.lease_token and job.progress is not None and job.progress_step is not None:
                known = Known(step=job.progress_step, encoded=job.progress)
            fresh = news(metrics, known)
            lines = [
                (kind, in_words(metric, kind), metric.encoded)
                for metric, kind in zip(fresh, kinds(fresh, known), strict=True)
            ]
            if fresh:
                await report_store.record_progress(connection, ref, fresh[-1], self._store.now())
            if warnings:
                told = await report_store.known_warnings(connection, ref, warnings)
                new_warnings = [warning for warning in dict.fromkeys(warnings) if warning not in told]
                await self._jobs.add_lines(
                    connection, ref, job.state, [(EventKind.WARNING, warning, None) for warning in new_warnings]
                )
            await self._jobs.add_lines(connection, ref, job.state, lines)
            for piece in usage:
                await self._meter(connection, ref, job, piece)

    async def commit(self, ref: LeaseRef, checkpoint: NewCheckpoint) -> list[bytes]:
        """Registers an uploaded checkpoint; returns encoded artifacts whose files may be deleted."""
        now = self._store.now()
        async with self._store.writing() as connection:
            job = await self._lock(connection, ref, *REPORTING)
            inserted = await report_store.insert_checkpoint(
                connection,
                ref,
                step=checkpoint.step,
                manifest_sha256=checkpoint.manifest_sha256,
                size_bytes=checkpoint.size_bytes,
                artifact=checkpoint.artifact,
                asked=checkpoint.asked,
                now=now,
            )
            if inserted:
                await report_store.forget_failures(connection, ref, now)
                await report_store.retire_checkpoints(connection, ref, self._settings.checkpoints_kept_max, now)
                message = f"checkpoint after step {checkpoint.step} committed"
                await self._jobs.add_lines(connection, ref, job.state, [(EventKind.CHECKPOINT, message, None)])
            obsolete = await report_store.list_obsolete(connection, ref, self._settings.obsolete_batch_max)
            kept = await report_store.committed_artifact(connection, ref, checkpoint.step)
        # Two attempts may have uploaded the same step; the one that was committed first is the checkpoint.
        return obsolete if kept == checkpoint.artifact else [*obsolete, checkpoint.artifact]

    async def succeed(self, ref: LeaseRef, model: ExportedModel) -> None:
        async with self._store.writing() as connection:
            job = await self._lock_unless_ended(connection, ref, AttemptOutcome.SUCCEEDED)
            if job is None:
                return
            if model.stopped_early:
                message = f"no evaluation got better: stopped early after step {model.step}; the best evaluation's weights ship"
                line = (EventKind.STOPPED_EARLY, message, job.progress)
                await self._jobs.add_lines(connection, ref, job.state, [line])
            change = await self._must(
                connection,
                JobTransition.SUCCEED,
                ref,
                f"the model is ready: {job.namespace}/{job.output_name}",
                lease_token=ref.lease_token,
                output_revision=model.revision,
                output_artifact=model.artifact,
            )
            await self._end_attempt(connection, ref, job, AttemptOutcome.SUCCEEDED, "")
            tuned = events.Model(
                model_id=f"{job.namespace}/{job.output_name}",
                revision=model.revision,
                kind=model.kind,
                adapter_rank=model.adapter_rank,
                base_model=job.base_model,
                base_revision=job.base_revision,
                artifact=model.artifact,
                lineage=model.lineage,
            )
            ending = Ending.STOPPED_EARLY if model.stopped_early else Ending.COMPLETED
            await self._jobs.end(connection, change, ending, tuned)

    async def fail(self, ref: LeaseRef, failure: JobFailure, *, retryable: bool) -> None:
        """`drained` in the failure's metadata says that the node went away in good order: that is nobody's failure. Any node of
        a gang may say that the attempt failed."""
        async with self._store.writing() as connection:
            ref = await lease_store.leading(connection, ref)
            job = await self._lock_unless_ended(connection, ref, AttemptOutcome.FAILED)
            if job is None:
                return
            drained = failure.metadata.get("drained") == "true"
            await self._conclude(
                connection, ref, job, AttemptOutcome.FAILED, failure, retryable=retryable, counts=not drained
            )

    async def stop(self, ref: LeaseRef, step: int) -> None:
        """An attempt that stopped without being asked to goes on elsewhere."""
        async with self._store.writing() as connection:
            job = await self._lock_unless_ended(connection, ref, AttemptOutcome.STOPPED)
            if job is None:
                return
            failure = JobFailure(
                reason="TRAINING_FAILED", message=f"the attempt stopped after step {step}", platform_fault=True
            )
            await self._conclude(connection, ref, job, AttemptOutcome.STOPPED, failure, retryable=True, counts=True)

    async def lose(self, connection: Connection, ref: LeaseRef, why: str, token: int | None = None) -> bool:
        """Ends a lease whose time is over, inside the caller's transaction; False when it was renewed meanwhile. `token` is of
        the node that is lost, when that is another one than the leading node: the attempt ends for the whole gang."""
        job = await lease_store.lock_leased_job(connection, ref)
        if not await lease_store.release_expired(connection, token or ref.lease_token, self._store.now()):
            return False
        if job is not None:
            failure = JobFailure(reason="TRAINING_FAILED", message=why, platform_fault=True)
            await self._conclude(connection, ref, job, AttemptOutcome.LOST, failure, retryable=True, counts=True)
        return True

    async def expire(self, ref: JobRef, why: str) -> bool:
        """Ends a job whose hold is over, as the platform's fault; False when it ended, or moved, meanwhile.

        An attempt that runs loses its lease with it: nobody would pay for its further steps.
        """
        failure = JobFailure(reason="HOLD_EXPIRED", message=why, platform_fault=True)
        error, message = failure_to(failure), f"failed: {why}"
        async with self._store.writing() as connection:
            change = await self._jobs.transition(connection, JobTransition.EXPIRE, ref, message, error=error)
            if change is None:
                token = await lease_store.lease_token(connection, ref)
                if token is None:
                    return False
                lease = LeaseRef(project_id=ref.project_id, job_id=ref.job_id, lease_token=token)
                job = await lease_store.lock_leased_job(connection, lease)
                # One that is being cancelled ends as cancelled, and owes nothing either way.
                if job is None or job.state is JobState.CANCELLING:
                    return False
                change = await self._must(
                    connection, JobTransition.FAIL, lease, message, lease_token=token, error=error
                )
                await self._end_attempt(connection, lease, job, AttemptOutcome.FAILED, why)
            await self._jobs.end(connection, change, failed_ending(change, failure))
        return True

    async def _conclude(
        self,
        connection: Connection,
        ref: LeaseRef,
        job: LeasedJob,
        outcome: AttemptOutcome,
        failure: JobFailure,
        *,
        retryable: bool,
        counts: bool,
    ) -> None:
        """What an attempt without a result means for its job: again, never again, or cancelled as it was asked."""
        failure_count = job.failure_count + int(counts)
        after = leases.aftermath(job.state, failure_count, self._settings.attempts_max)
        if after is leases.Aftermath.CANCEL:
            change = await self._must(connection, JobTransition.STOP, ref, "cancelled", lease_token=ref.lease_token)
            await self._end_attempt(connection, ref, job, outcome, failure.message)
            await self._jobs.end(connection, change, cancelled_ending(change))
            return
        if after is leases.Aftermath.REQUEUE and retryable:
            delay_s = leases.requeue_delay_s(failure_count) if counts else 0.0
            await self._must(
                connection,
                JobTransition.REQUEUE,
                ref,
                f"attempt {job.attempt_count} ended: {failure.message}; the job goes on from its last checkpoint",
                kind=EventKind.REQUEUED,
                lease_token=ref.lease_token,
                wake_at=self._store.now() + timedelta(seconds=delay_s),
                failure_count=failure_count,
            )
            await self._end_attempt(connection, ref, job, outcome, failure.message)
            return
        final = failure
        if retryable:
            final = JobFailure(
                reason=failure.reason,
                message=f"given up after {failure_count} failures in a row; the last one: {failure.message}",
                platform_fault=True,
                metadata=failure.metadata,
            )
        change = await self._must(
            connection,
            JobTransition.FAIL,
            ref,
            f"failed: {final.message}",
            lease_token=ref.lease_token,
            error=failure_to(final),
        )
        await self._end_attempt(connection, ref, job, outcome, failure.message)
        await self._jobs.end(connection, change, failed_ending(change, final))

    async def _meter(self, connection: Connection, ref: LeaseRef, job: LeasedJob, usage: Usage) -> None:
        """Records work once, with its event; the first record of a piece of work is the one that counts."""
        now = self._store.now()
        key = usage.work_key(ref.job_id)
        if await report_store.record_usage(connection, ref, usage, now):
            event = events.training_usage(ref.project_id, ref.job_id, job.organization_id, usage, now)
            await self._store.outbox.add(connection, event, subject_name=event.tuning_job, key=key)
            return
        first = await report_store.recorded_tokens(connection, ref, key)
        if first is None:
            log.error("usage overlaps steps that are billed already; ignored", work_key=key, tokens=usage.tokens)
        elif first != usage.tokens:
            log.warning(
                "redone work counts differently; the first count stays", work_key=key, first=first, now=usage.tokens
            )

    async def _lock(self, connection: Connection, ref: LeaseRef, *states: JobState) -> LeasedJob:
        job = await lease_store.lock_leased_job(connection, ref)
        if job is None:
            raise _stale(ref)
        if states and job.state not in states:
            raise FailedPrecondition(
                "STATE_CONFLICT",
                f"the job is {job.state}; an attempt reports only after StartAttempt",
                metadata={"state": job.state.value},
            )
        return job

    async def _lock_unless_ended(
        self, connection: Connection, ref: LeaseRef, outcome: AttemptOutcome
    ) -> LeasedJob | None:
        """None when this very ending was recorded before: its answer got lost and it is told again."""
        job = await lease_store.lock_leased_job(connection, ref)
        if job is None and await lease_store.attempt_outcome(connection, ref) is not outcome:
            raise _stale(ref)
        return job

    async def _must(
        self, connection: Connection, transition: JobTransition, ref: LeaseRef, message: str, **values: object
    ) -> Transitioned:
        kind = values.pop("kind", EventKind.STATE_CHANGED)
        assert isinstance(kind, EventKind)
        change = await self._jobs.transition(connection, transition, ref, message, kind=kind, **values)
        if change is None:
            raise FailedPrecondition("STATE_CONFLICT", f"the job's state does not allow {transition}")
        return change

    async def _end_attempt(
        self, connection: Connection, ref: LeaseRef, job: LeasedJob, outcome: AttemptOutcome, message: str
    ) -> None:
        owner, now = resource_name(ref), self._store.now()
        followers = await lease_store.end_attempt(connection, ref, owner, outcome, message, now)
        await notify(connection, *(node_topic(node) for node in (job.node, *followers)))


def cancelled_ending(change: Transitioned) -> Ending:
    return Ending.CANCELLED_RUNNING if change.start_time is not None else Ending.CANCELLED_BEFORE_RUN


def failed_ending(change: Transitioned, failure: JobFailure) -> Ending:
    if failure.platform_fault:
        return Ending.PLATFORM_FAILURE
    return Ending.USER_FAILURE if change.start_time is not None else Ending.REFUSED


def _stale(ref: LeaseRef) -> Aborted:
    return Aborted(
        "LEASE_STALE",
        f"lease {ref.lease_token} is not in force any more; stop this attempt",
        metadata={"lease_token": str(ref.lease_token)},
    )
