"""Decisions about leases: when one ends, when the scheduler may judge at all, what becomes of a job that lost its own.

Pure: it is given the time and answers; what is stored guards itself by the token.
"""

from datetime import datetime
from enum import StrEnum

from services.scheduler.jobs.lifecycle import JobState

REQUEUE_DELAY_S_FIRST = 0.5
REQUEUE_DELAY_S_MAX = 60.0


class Aftermath(StrEnum):
    """What becomes of a job whose attempt ended without a result."""

    REQUEUE = "REQUEUE"
    FAIL = "FAIL"
    CANCEL = "CANCEL"


class ClockWatch:
    """Says when a clock was set: from one look to the next it then went on by another time than the monotonic clock."""

    def __init__(self, jump_s_max: float) -> None:
        self._jump_s_max = jump_s_max
        self._offset_s: float | None = None

    def has_jumped(self, time: datetime, monotonic_s: float) -> bool:
        """Whether the clock that shows `time` was set since the last look."""
        before_s, self._offset_s = self._offset_s, time.timestamp() - monotonic_s
        return before_s is not None and abs(self._offset_s - before_s) > self._jump_s_max


def aftermath(state: JobState, failure_count: int, attempts_max: int) -> Aftermath:
    """`failure_count` counts this failure too. It starts again at each committed checkpoint: a job that makes progress
    is given more attempts."""
    if state is JobState.CANCELLING:
        return Aftermath.CANCEL
    return Aftermath.FAIL if failure_count >= attempts_max else Aftermath.REQUEUE


def requeue_delay_s(failure_count: int) -> float:
    """Doubles with each failure in a row, so that a job that breaks its node at once does not do so in a loop."""
    return min(REQUEUE_DELAY_S_FIRST * 2.0 ** max(0, failure_count - 1), REQUEUE_DELAY_S_MAX)
