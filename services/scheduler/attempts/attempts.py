"""Not pure: database, outbox. The end of an attempt, and what it means for the job: done, failed, again or cancelled.

Every ending is one transaction, fenced by the lease's token, that gives the devices back. The lifecycle's table decides
what is allowed.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from chassis.db.pool import Connection
from services.scheduler.attempts import fence
from services.scheduler.attempts.attempt import AttemptOutcome, BadCheckpoint, ExportedModel, LeasedJob, MarkedBad
from services.scheduler.attempts.store import AttemptStore
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.convert import encoded, failure_to_proto, job_name
from services.scheduler.jobs.endings import Ending, JobFailure, cancelled_ending, failed_ending
from services.scheduler.jobs.job import EventKind, JobRef, LeaseRef, TunedModel
from services.scheduler.jobs.lifecycle import JobState, JobTransition
from services.scheduler.jobs.transitions import JobTransitions, Line
from services.scheduler.placement import leases
from services.scheduler.placement.allocation import AllocationKind
from services.scheduler.placement.store import AllocationStore
from services.scheduler.watching.hub import node_topic

# The cause, in the metadata of a failure, of an attempt that could not write.
DISK_FULL = "disk_full"


class Attempts:
    def __init__(self, database: Database, jobs: JobTransitions, settings: SchedulerSettings) -> None:
        self._database = database
        self._jobs = jobs
        self._settings = settings

    async def succeed(self, ref: LeaseRef, model: ExportedModel) -> None:
        async with self._database.writing() as connection:
            job = await fence.lock_unless_ended(connection, ref, AttemptOutcome.SUCCEEDED)
            if job is None:
                return
            before: list[Line] = []
            if model.stopped_early:
                message = (
                    f"no evaluation got better: stopped early after step {model.step}; "
                    "the best evaluation's weights ship"
                )
                before = [(EventKind.STOPPED_EARLY, message, job.progress)]
            change = await self._jobs.must(
                connection,
                JobTransition.SUCCEED,
                ref,
                f"the model is ready: {job.namespace}/{job.output_name}",
                before=before,
                lease_token=ref.lease_token,
                output_revision=model.revision,
                output_artifact=model.artifact,
            )
            await self._end_attempt(connection, ref, job, AttemptOutcome.SUCCEEDED, "")
            tuned = TunedModel(
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

    async def fail(
        self, ref: LeaseRef, failure: JobFailure, *, retryable: bool, bad_checkpoint: BadCheckpoint | None = None
    ) -> None:
        """`drained` in the failure's metadata says that the node went away in good order: that is nobody's failure. Any
        node of a gang may say that the attempt failed.

        A `bad_checkpoint` is given up, and the job goes on from the one before. That counts as a failure only when this
        step's checkpoint was bad before.
        """
        async with self._database.writing() as connection:
            ref = await AttemptStore(connection).leading(ref)
            job = await fence.lock_unless_ended(connection, ref, AttemptOutcome.FAILED)
            if job is None:
                return
            counts, before = failure.metadata.get("drained") != "true", list[Line]()
            if bad_checkpoint is not None:
                marked = await AttemptStore(connection).mark_bad(
                    ref, bad_checkpoint, failure.message, self._database.now()
                )
                if marked is not None:
                    counts = counts and marked.bad_count > 1
                    before = [_given_up(bad_checkpoint, marked, failure.message)]
            await self._conclude(
                connection, ref, job, AttemptOutcome.FAILED, failure, retryable=retryable, counts=counts, before=before
            )

    async def stop(self, ref: LeaseRef, step: int) -> None:
        """An attempt that stopped without being asked to goes on elsewhere."""
        async with self._database.writing() as connection:
            job = await fence.lock_unless_ended(connection, ref, AttemptOutcome.STOPPED)
            if job is None:
                return
            failure = JobFailure(
                reason="TRAINING_FAILED", message=f"the attempt stopped after step {step}", platform_fault=True
            )
            await self._conclude(connection, ref, job, AttemptOutcome.STOPPED, failure, retryable=True, counts=True)

    async def lose(
        self,
        connection: Connection,
        ref: LeaseRef,
        why: str,
        token: int | None = None,
        *,
        at: datetime,
        is_over: bool = False,
    ) -> bool:
        """Ends a lease whose time is over, inside the caller's transaction; False when it was renewed meanwhile.

        `at` is the time of the database by which it was judged. `token` is that of the lost node, when another node
        leads the gang: the attempt ends for the whole gang. `is_over` ends a lease whose time is not over, too.
        """
        job = await AttemptStore(connection).lock_leased_job(ref)
        allocations = AllocationStore(connection)
        if is_over:
            await allocations.expire_lease(token or ref.lease_token, at)
        released = await allocations.release_expired(token or ref.lease_token, at=at, now=self._database.now())
        if not released:
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
        error, message = encoded(failure_to_proto(failure)), f"failed: {why}"
        async with self._database.writing() as connection:
            change = await self._jobs.transition(connection, JobTransition.EXPIRE, ref, message, error=error)
            if change is None:
                attempts = AttemptStore(connection)
                lease = await attempts.lease_of(ref)
                job = None if lease is None else await attempts.lock_leased_job(lease)
                # One that is being cancelled ends as cancelled, and owes nothing either way.
                if lease is None or job is None or job.state is JobState.CANCELLING:
                    return False
                change = await self._jobs.must(
                    connection,
                    JobTransition.FAIL,
                    lease,
                    message,
                    lease_token=lease.lease_token,
                    error=error,
                    failure_count=job.failure_count + 1,
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
        before: Sequence[Line] = (),
    ) -> None:
        """What an attempt without a result means for its job: again, never again, or cancelled as it was asked."""
        failure_count = job.failure_count + int(counts)
        full = failure.metadata.get("cause") == DISK_FULL
        attempts_max = self._settings.disk_full_attempts_max if full else self._settings.attempts_max
        after = leases.aftermath(job.state, failure_count, attempts_max)
        if after is leases.Aftermath.CANCEL:
            change = await self._jobs.must(
                connection, JobTransition.STOP, ref, "cancelled", before=before, lease_token=ref.lease_token
            )
            await self._end_attempt(connection, ref, job, outcome, failure.message)
            await self._jobs.end(connection, change, cancelled_ending(change))
            return
        if after is leases.Aftermath.REQUEUE and retryable:
            delay_s = leases.requeue_delay_s(failure_count) if counts else 0.0
            await self._jobs.must(
                connection,
                JobTransition.REQUEUE,
                ref,
                f"attempt {job.attempt_count} ended: {failure.message}; the job goes on from its last checkpoint",
                kind=EventKind.REQUEUED,
                before=before,
                lease_token=ref.lease_token,
                wake_delay_s=delay_s,
                failure_count=failure_count,
            )
            blames_node = counts and failure.reason != "DEPENDENCY_UNAVAILABLE"
            await self._end_attempt(connection, ref, job, outcome, failure.message, blames_node=blames_node)
            return
        final = failure
        if retryable:
            message = f"given up after {failure_count} failures in a row; the last one: {failure.message}"
            final = replace(failure, message=message, platform_fault=True)
        change = await self._jobs.must(
            connection,
            JobTransition.FAIL,
            ref,
            f"failed: {final.message}",
            before=before,
            lease_token=ref.lease_token,
            error=encoded(failure_to_proto(final)),
            failure_count=job.failure_count + 1,
        )
        # What fails anywhere, or by the user's fault, says nothing about the node.
        await self._end_attempt(connection, ref, job, outcome, failure.message, blames_node=counts and retryable)
        await self._jobs.end(connection, change, failed_ending(change, final))

    async def _end_attempt(
        self,
        connection: Connection,
        ref: LeaseRef,
        job: LeasedJob,
        outcome: AttemptOutcome,
        message: str,
        *,
        blames_node: bool = False,
    ) -> None:
        """Gives the devices of all its nodes back, which hear of it. `blames_node`: the node may be at fault."""
        now, allocations = self._database.now(), AllocationStore(connection)
        await allocations.release(AllocationKind.TRAINING, ref.lease_token, job_name(ref), now)
        followers = await allocations.release_followers(ref.lease_token, now)
        await AttemptStore(connection).end(ref, outcome, message, blames_node=blames_node)
        self._database.ring(*(node_topic(node) for node in (job.node, *followers)))


def _given_up(bad: BadCheckpoint, marked: MarkedBad, reason: str) -> Line:
    before = marked.step_before
    next_start = "starts anew" if before is None else f"goes on from the one after step {before}"
    message = f"the checkpoint after step {bad.step} cannot be used: {reason}; the job {next_start}"
    return EventKind.WARNING, message, None
