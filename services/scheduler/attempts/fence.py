"""Not pure: database. The fence of an attempt: whoever reports must hold the lease of the job, which is then locked."""

from chassis.db.pool import Connection
from chassis.errors import Aborted, FailedPrecondition
from services.scheduler.attempts.attempt import AttemptOutcome, LeasedJob
from services.scheduler.attempts.store import AttemptStore
from services.scheduler.jobs.job import LeaseRef
from services.scheduler.jobs.lifecycle import JobState


async def lock(connection: Connection, ref: LeaseRef, *states: JobState) -> LeasedJob:
    """Raises Aborted for a lease that is not in force, FailedPrecondition for a job in none of these states."""
    job = await AttemptStore(connection).lock_leased_job(ref)
    if job is None:
        raise _stale(ref)
    if states and job.state not in states:
        raise FailedPrecondition(
            "STATE_CONFLICT",
            f"the job is {job.state}; an attempt reports only after StartAttempt",
            metadata={"state": job.state.value},
        )
    return job


async def lock_unless_ended(connection: Connection, ref: LeaseRef, outcome: AttemptOutcome) -> LeasedJob | None:
    """None when this very ending was recorded before: its answer got lost and it is told again."""
    attempts = AttemptStore(connection)
    job = await attempts.lock_leased_job(ref)
    if job is None and await attempts.outcome(ref) is not outcome:
        raise _stale(ref)
    return job


def _stale(ref: LeaseRef) -> Aborted:
    return Aborted(
        "LEASE_STALE",
        f"lease {ref.lease_token} is not in force any more; stop this attempt",
        metadata={"lease_token": str(ref.lease_token)},
    )
