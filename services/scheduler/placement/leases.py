"""Decisions about leases: when one ends, when the scheduler may judge at all, what becomes of a job that lost its own.

Pure: it is given the time and answers; what is stored guards itself by the token.
"""

from datetime import datetime, timedelta
from enum import StrEnum

from services.scheduler.jobs.lifecycle import JobState

REQUEUE_DELAY_S_FIRST = 0.5
REQUEUE_DELAY_S_MAX = 60.0


class Aftermath(StrEnum):
    """What becomes of a job whose attempt ended without a result."""

    REQUEUE = "REQUEUE"
    FAIL = "FAIL"
    CANCEL = "CANCEL"


def expiry(now: datetime, lease_duration_s: float) -> datetime:
    """When a lease that is made or renewed now ends."""
    return now + timedelta(seconds=lease_duration_s)


def is_node_lost(seen_at: datetime, now: datetime, lease_duration_s: float) -> bool:
    """A node that was silent for as long as a lease lives has lost all of them."""
    return now - seen_at > timedelta(seconds=lease_duration_s)


def aftermath(state: JobState, failure_count: int, attempts_max: int) -> Aftermath:
    """`failure_count` counts this failure too. It starts again at each committed checkpoint: a job that makes progress
    is given more attempts."""
    if state is JobState.CANCELLING:
        return Aftermath.CANCEL
    return Aftermath.FAIL if failure_count >= attempts_max else Aftermath.REQUEUE


def requeue_delay_s(failure_count: int) -> float:
    """Doubles with each failure in a row, so that a job that breaks its node at once does not do so in a loop."""
    return min(REQUEUE_DELAY_S_FIRST * 2.0 ** max(0, failure_count - 1), REQUEUE_DELAY_S_MAX)
