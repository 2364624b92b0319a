"""Decisions about leases, without a clock that runs."""

import pytest

from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.placement.leases import (
    REQUEUE_DELAY_S_MAX,
    Aftermath,
    aftermath,
    requeue_delay_s,
)


@pytest.mark.parametrize("state", [JobState.STARTING, JobState.RUNNING])
def test_a_lost_attempt_is_repeated_until_the_limit(state: JobState) -> None:
    assert aftermath(state, 9, 10) is Aftermath.REQUEUE
    assert aftermath(state, 10, 10) is Aftermath.FAIL


def test_a_cancelled_job_that_lost_its_node_is_cancelled() -> None:
    assert aftermath(JobState.CANCELLING, 1, 10) is Aftermath.CANCEL
    assert aftermath(JobState.CANCELLING, 10, 10) is Aftermath.CANCEL


def test_the_delay_doubles_up_to_its_limit() -> None:
    assert [requeue_delay_s(count) for count in (0, 1, 2, 3, 4)] == [0.5, 0.5, 1.0, 2.0, 4.0]
    assert requeue_delay_s(1000) == REQUEUE_DELAY_S_MAX
