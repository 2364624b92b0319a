"""Decisions about leases: when one ends, what becomes of a job that lost its own.

Pure: it is given the time and answers; what is stored guards itself by the token.
"""

from enum import StrEnum

from services.scheduler.jobs.lifecycle import JobState

REQUEUE_DELAY_S_FIRST = 0.5
REQUEUE_DELAY_S_MAX = 60.0


class Aftermath(StrEnum):
    """What becomes of a job whose attempt ended without a result."""

    REQUEUE = "REQUEUE"
    FAIL = "FAIL"
    CANCEL = "CANCEL"


def aftermath(state: JobState, failure_count: int, attempts_max: int) -> Aftermath:
    """`failure_count` counts this failure too. It starts again at each committed checkpoint: a job that makes progress
    is given more attempts."""
    if state is JobState.CANCELLING:
        return Aftermath.CANCEL
    return Aftermath.FAIL if failure_count >= attempts_max else Aftermath.REQUEUE


def requeue_delay_s(failure_count: int) -> float:
    """Doubles with each failure in a row, so that a job that breaks its node at once does not do so in a loop."""
    return min(REQUEUE_DELAY_S_FIRST * 2.0 ** max(0, failure_count - 1), REQUEUE_DELAY_S_MAX)
