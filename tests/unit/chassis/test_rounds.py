"""A worker goes on after passing trouble and ends with a defect; a guard judges only after it has watched long
enough."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from chassis.clock import ManualClock
from chassis.rounds import AbsenceGuard, ClockWatch, FailingItems, Signal, outlived, run_rounds


class Defect(Exception):
    """Ends the rounds of a test."""


class Script:
    """Answers of the rounds, one after the other."""

    def __init__(self, *answers: bool | Exception) -> None:
        self._answers: Iterator[bool | Exception] = iter(answers)
        self.moments: list[float] = []
        self.clock = ManualClock()

    async def round(self) -> bool:
        self.moments.append(self.clock.monotonic())
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def wait(self) -> None:
        await self.clock.sleep(10)


async def test_a_round_with_more_to_do_is_followed_at_once() -> None:
    script = Script(True, True, False, Defect())
    async with asyncio.TaskGroup() as group:
        rounds = group.create_task(_until_defect(script))
        await script.clock.wait_for_sleepers()
        assert script.moments == [0, 0, 0]
        await script.clock.advance(10)
        await rounds
    assert script.moments == [0, 0, 0, 10]


async def test_passing_trouble_is_waited_out_with_growing_pauses() -> None:
    script = Script(ConnectionError(), ConnectionError(), False, ConnectionError(), Defect())
    async with asyncio.TaskGroup() as group:
        rounds = group.create_task(_until_defect(script))
        await script.clock.wait_for_sleepers()
        await script.clock.advance(100)
        await rounds
    first, second, third, fourth, fifth = script.moments
    assert 0 < second - first < third - second < 1
    assert (fourth - third, fifth - fourth < 1) == (10, True)


async def test_what_passes_is_for_the_caller_to_say() -> None:
    script = Script(Defect(), ConnectionError())
    with pytest.raises(ConnectionError):
        async with asyncio.timeout(5):
            work = asyncio.create_task(
                run_rounds(
                    "test",
                    script.round,
                    wait=script.wait,
                    clock=script.clock,
                    is_passing=lambda error: isinstance(error, Defect),
                )
            )
            await script.clock.wait_for_sleepers()
            await script.clock.advance(10)
            await work


async def _until_defect(script: Script) -> None:
    with pytest.raises(Defect):
        await run_rounds("test", script.round, wait=script.wait, clock=script.clock)


async def test_a_signal_that_came_early_is_kept_once() -> None:
    signal = Signal()
    signal.send()
    signal.send()
    async with asyncio.timeout(5):
        await signal.wait()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await signal.wait()
    await signal.wait(0.001)


def test_nobody_is_judged_before_the_watch_was_long_enough() -> None:
    clock = ManualClock()
    guard = AbsenceGuard(clock, gap_s_max=5, watch_s_min=10)
    for _ in range(3):
        clock.jump(3)
        guard.look()
        assert not guard.may_judge
    clock.jump(1)
    guard.look()
    assert guard.may_judge


def test_a_gap_begins_the_watch_anew() -> None:
    clock = ManualClock()
    guard = AbsenceGuard(clock, gap_s_max=5, watch_s_min=10)
    for _ in range(20):
        clock.jump(1)
        guard.look()
    assert guard.may_judge
    clock.jump(6)
    guard.look()
    assert not guard.may_judge


async def test_a_worker_that_is_outlived_comes_back_after_any_failure() -> None:
    clock, runs = ManualClock(), 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise Defect

    life = asyncio.ensure_future(outlived("worker", run, clock=clock)())
    await clock.wait_for_sleepers()
    assert runs == 1
    await clock.advance(10.0)
    await life
    assert runs == 3


def test_a_clock_that_was_set_is_told_from_time_that_passes() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    watch = ClockWatch(2.0)
    assert not watch.has_jumped(now, 100.0)
    assert not watch.has_jumped(now + timedelta(seconds=3600), 3700.0)
    assert watch.has_jumped(now + timedelta(seconds=3631), 3701.0)
    assert not watch.has_jumped(now + timedelta(seconds=3632), 3702.0)
    assert watch.has_jumped(now, 3703.0)


class Failure(Exception):
    """What one item fails with."""


def tried(items: FailingItems, item: str, error: Exception | None = None) -> None:
    with items.trying(item):
        if error is not None:
            raise error


def test_a_failing_item_is_left_alone_for_growing_pauses_and_the_others_are_not() -> None:
    clock = ManualClock()
    items = FailingItems("test", clock, first_s=1.0, last_s=4.0)
    pauses = []
    for _ in range(6):
        tried(items, "bad", Failure())
        assert items.leaves_alone("bad")
        assert not items.leaves_alone("good")
        began_s = clock.monotonic()
        while items.leaves_alone("bad"):
            clock.jump(0.125)
        pauses.append(clock.monotonic() - began_s)
    assert 0.5 <= pauses[0] <= 1.125
    assert 2.0 <= pauses[-1] <= 4.125
    # Once it went well it begins anew.
    tried(items, "bad")
    tried(items, "bad", Failure())
    clock.jump(1.0)
    assert not items.leaves_alone("bad")


def test_passing_trouble_is_no_items_fault() -> None:
    items = FailingItems("test", ManualClock())
    with pytest.raises(ConnectionError):
        tried(items, "any", ConnectionError())
    assert not items.leaves_alone("any")


def test_failing_items_are_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chassis.rounds.ITEMS_FAILING_MAX", 2)
    items = FailingItems("test", ManualClock())
    for item in "abc":
        tried(items, item, Failure())
    assert [items.leaves_alone(item) for item in "abc"] == [False, True, True]
