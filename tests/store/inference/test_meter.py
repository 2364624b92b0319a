"""The meter on a real database: what a call used is committed however its commits fail, and told once for each part."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from chassis.bus.outbox import Outbox
from chassis.clock import ManualClock
from chassis.db.pool import Connection, Pool
from chassis.errors import Unavailable
from chassis.ids import SystemIds
from finemesh.events.v1 import usage_events_pb2
from services.inference.config import InferenceSettings
from services.inference.metering.domain import MeteredCall
from services.inference.metering.meter import Meter
from tests.harness.fixtures import SettingsFactory

INTERVAL_S = 5.0


class TiredPool:
    """A pool whose next transactions fail as told: before their commit, or although they were committed."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.failures: list[str] = []

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        failure = self.failures.pop(0) if self.failures else ""
        if failure == "before":
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        async with self._pool.acquire() as connection:
            yield connection
        if failure == "after":
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


class Metering:
    """A meter with its database as a test wants it."""

    def __init__(self, pool: Pool, make_settings: SettingsFactory, **overrides: Any) -> None:
        self._pool = pool
        self.database = TiredPool(pool)
        self.clock = ManualClock()
        shared = make_settings("inference")
        settings = InferenceSettings(
            database_url=shared.database_url, usage_batch_s=0, metering_interval_s=INTERVAL_S, **overrides
        )
        outbox = Outbox(settings, clock=self.clock, ids=SystemIds())
        self.meter = Meter(self.database, outbox, settings=settings, clock=self.clock)  # type: ignore[arg-type]

    async def told(self) -> list[list[str]]:
        """The work keys of each event."""
        rows = await self._pool.fetch("SELECT payload FROM outbox ORDER BY created_at, id")
        events = [usage_events_pb2.InferenceUsageRecorded.FromString(row["payload"]) for row in rows]
        return [[record.work_key for record in event.records] for event in events]


def call(generation_id: str) -> MeteredCall:
    return MeteredCall(
        generation_id=generation_id, project_id="p", organization_id="o", model_id="m", base_model="b", api_key_id="k"
    )


def use(metering: Metering, generation_id: str, tokens: int = 3) -> None:
    """A call that ends, or that its caller leaves."""
    with metering.meter.metered(call(generation_id)) as counted:
        counted.count(2, tokens)


@pytest.fixture
async def clean(pool: Pool) -> None:
    await pool.execute("TRUNCATE outbox")


pytestmark = pytest.mark.usefixtures("clean")


async def test_running_calls_are_told_every_interval(pool: Pool, make_settings: SettingsFactory) -> None:
    metering = Metering(pool, make_settings)
    with metering.meter.metered(call("gen-a")) as first, metering.meter.metered(call("gen-b")) as second:
        first.count(2, 128)
        second.count(9, 1)
        await metering.meter.round()
        assert await metering.told() == []
        await metering.clock.advance(INTERVAL_S)
        await metering.meter.round()
        assert await metering.told() == [["gen-a:0-128", "gen-b:0-1"]]
        first.count(2, 301)
    await metering.meter.round()
    assert (await metering.told())[1:] == [["gen-a:128-301"]]


async def test_a_batch_that_could_not_be_committed_is_kept(pool: Pool, make_settings: SettingsFactory) -> None:
    metering = Metering(pool, make_settings)
    use(metering, "gen-a")
    metering.database.failures = ["before", "before"]
    for _ in range(2):
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await metering.meter.round()
    use(metering, "gen-b")
    assert await metering.meter.round()
    await metering.meter.round()
    assert await metering.told() == [["gen-a:0-3"], ["gen-b:0-3"]]


async def test_a_batch_that_was_committed_without_a_word_is_told_once_and_alone(
    pool: Pool, make_settings: SettingsFactory
) -> None:
    """With others in it, it would be another event: what billing posts would depend on which one comes first."""
    metering = Metering(pool, make_settings)
    use(metering, "gen-a")
    metering.database.failures = ["after"]
    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await metering.meter.round()
    use(metering, "gen-b")
    assert await metering.meter.round()
    await metering.meter.round()
    assert await metering.told() == [["gen-a:0-3"], ["gen-b:0-3"]]


async def test_parts_that_do_not_fit_in_one_event_come_in_several(pool: Pool, make_settings: SettingsFactory) -> None:
    metering = Metering(pool, make_settings, event_size_bytes_max=1024)
    names = [f"gen-{number}" for number in range(100)]
    for name in names:
        use(metering, name)
    running = asyncio.create_task(metering.meter.run())
    while len([key for event in await metering.told() for key in event]) < len(names):
        # A batch that is too large is a defect to `run`, whose process starts it again.
        if running.done():
            running = asyncio.create_task(metering.meter.run())
        await metering.clock.advance(1)
    assert sorted(key for event in await metering.told() for key in event) == sorted(f"{name}:0-3" for name in names)
    running.cancel()
    await asyncio.wait([running])


async def test_calls_are_refused_while_too_many_parts_wait(pool: Pool, make_settings: SettingsFactory) -> None:
    metering = Metering(pool, make_settings, usage_waiting_max=2)
    use(metering, "gen-a")
    use(metering, "gen-b")
    with pytest.raises(Unavailable):
        use(metering, "gen-c")
    await metering.meter.round()
    use(metering, "gen-c")


async def test_running_calls_pile_nothing_up_while_the_database_is_away(
    pool: Pool, make_settings: SettingsFactory
) -> None:
    metering = Metering(pool, make_settings, usage_waiting_max=1)
    with metering.meter.metered(call("gen-a")) as counted:
        for number in range(1, 6):
            counted.count(2, number)
            metering.database.failures = ["before"]
            await metering.clock.advance(INTERVAL_S)
            with pytest.raises(asyncpg.ConnectionDoesNotExistError):
                await metering.meter.round()
    while await metering.meter.round():
        pass
    assert await metering.told() == [["gen-a:0-1"], ["gen-a:1-5"]]


async def test_a_stop_commits_what_is_left_after_failures(pool: Pool, make_settings: SettingsFactory) -> None:
    metering = Metering(pool, make_settings)
    running = asyncio.create_task(metering.meter.run())
    await asyncio.sleep(0)
    metering.database.failures = ["before"]
    with metering.meter.metered(call("gen-a")) as counted:
        counted.count(2, 7)
        running.cancel()
        while not running.done():
            await metering.clock.advance(1)
    assert await metering.told() == [["gen-a:0-7"]]
