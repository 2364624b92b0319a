"""What is repeated, how long the pauses are, and when there is no point in another attempt."""

import asyncio
import random

import pytest

from chassis.clock import ManualClock
from chassis.errors import Aborted, DeadlineExceeded, DomainError, Unavailable
from chassis.rpc import deadline
from chassis.rpc.retry import retry


class Flaky:
    def __init__(self, *errors: DomainError) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


class RecordingClock(ManualClock):
    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)


def unavailable(retry_after_s: float | None = None) -> Unavailable:
    return Unavailable("DEPENDENCY_UNAVAILABLE", "down", retry_after_s=retry_after_s)


async def test_it_repeats_until_it_works_with_growing_bounded_pauses() -> None:
    clock, call = RecordingClock(), Flaky(*[unavailable() for _ in range(9)])
    answer = await retry(call, clock=clock, attempts=10, base_s=1, cap_s=8, rng=random.Random(1))
    assert (answer, call.calls) == ("done", 10)
    assert all(0 <= pause <= min(8, 2**n) for n, pause in enumerate(clock.pauses))
    assert max(clock.pauses) > 3


async def test_the_last_error_is_raised_after_the_last_attempt() -> None:
    call = Flaky(unavailable(), DeadlineExceeded("DEADLINE_TOO_SHORT", "slow"), unavailable())
    with pytest.raises(Unavailable):
        await retry(call, clock=RecordingClock(), attempts=3)
    assert call.calls == 3


async def test_other_errors_are_not_repeated() -> None:
    call = Flaky(Aborted("LEASE_STALE", "lost"))
    with pytest.raises(Aborted):
        await retry(call, clock=RecordingClock())
    assert call.calls == 1


async def test_the_server_may_ask_for_a_longer_pause() -> None:
    clock = RecordingClock()
    await retry(Flaky(unavailable(retry_after_s=60)), clock=clock, cap_s=1)
    assert clock.pauses == [60]


async def test_a_pause_that_outlasts_the_deadline_is_not_taken() -> None:
    clock, call = RecordingClock(), Flaky(unavailable(retry_after_s=60))
    with deadline.limit(5), pytest.raises(Unavailable):
        await retry(call, clock=clock)
    assert (call.calls, clock.pauses) == (1, [])
