"""Ids sort by their birth, whatever the clock does; the manual clock wakes sleepers at their own moments."""

import asyncio
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.clock import ManualClock, SystemClock
from chassis.ids import SeededIds, SystemIds


@pytest.mark.parametrize("prefix", ["ft", "proj_", "file-"])
def test_the_form_of_an_id(prefix: str) -> None:
    start = prefix if prefix[-1] in "-_" else f"{prefix}-"
    assert re.fullmatch(start + "[0-9a-hjkmnp-tv-z]{26}", SystemIds().new(prefix))


def test_ids_of_one_process_are_sorted_and_unique() -> None:
    ids = SystemIds()
    made = [ids.new("x") for _ in range(5000)]
    assert made == sorted(set(made))


@given(st.lists(st.floats(min_value=-10, max_value=10), max_size=30))
def test_ids_stay_sorted_when_the_clock_jumps(jumps: list[float]) -> None:
    clock = ManualClock()
    ids, made = SeededIds(1, clock), []
    for seconds in jumps:
        clock.jump(seconds)
        made.append(ids.new("x"))
    assert made == sorted(set(made))


def test_later_milliseconds_sort_after_earlier_ones_of_another_process() -> None:
    clock = ManualClock()
    early = SeededIds(1, clock).new("x")
    clock.jump(0.002)
    assert early < SeededIds(2, clock).new("x")


def test_a_seed_repeats_itself() -> None:
    one, two = (SeededIds(7, ManualClock()) for _ in range(2))
    assert [one.new("x"), one.uuid()] == [two.new("x"), two.uuid()]
    assert one.uuid().version == 4


async def test_sleepers_wake_in_order_at_their_own_time() -> None:
    clock, story = ManualClock(), []

    async def sleeper(name: str, seconds: float, times: int) -> None:
        for _ in range(times):
            await clock.sleep(seconds)
            story.append((name, clock.monotonic()))

    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper("slow", 3, 1))
        group.create_task(sleeper("fast", 2, 2))
        await clock.wait_for_sleepers(2)
        await clock.advance(1.5)
        assert story == []
        await clock.advance(2.5)
    assert story == [("fast", 2.0), ("slow", 3.0), ("fast", 4.0)]
    assert (clock.now() - ManualClock().now()).total_seconds() == 4
    assert clock.sleepers == 0


async def test_the_system_clock_is_aware_and_goes_on() -> None:
    clock = SystemClock()
    before = clock.monotonic()
    await clock.sleep(0.001)
    assert clock.monotonic() > before
    assert clock.now().utcoffset() is not None
