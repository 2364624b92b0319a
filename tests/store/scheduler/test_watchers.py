"""Many who watch or ask cost what one costs: a read for each change, and one look at the queue within a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from chassis.errors import NotFound
from finemesh.tuning.v1 import tuning_service_pb2
from services.scheduler.api import job_feed
from services.scheduler.api.job_feed import JobFeeds, JobReader, News
from services.scheduler.api.job_view import JobView
from services.scheduler.api.job_watch import Follower
from services.scheduler.api.queue_snapshot import QueueSnapshots
from services.scheduler.jobs.job import JobEvent, JobRef
from services.scheduler.jobs.store import JobStore
from tests.harness.polling import eventually
from tests.store.scheduler.world import World, metric

WATCHERS = 50
PER_MESSAGE_MAX = 10


class CountingReader(JobReader):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.reads = 0
        self.histories = 0

    async def read(self, ref: JobRef, before: News | None) -> News:
        self.reads += 1
        return await super().read(ref, before)

    async def history(self, ref: JobRef, after_sequence: int) -> list[JobEvent]:
        self.histories += 1
        return await super().history(ref, after_sequence)


@dataclass(kw_only=True)
class Crowd:
    feeds: JobFeeds
    reader: CountingReader
    follower: Follower
    heard: list[list[tuning_service_pb2.WatchTuningJobResponse]] = field(default_factory=list)

    @asynccontextmanager
    async def watching(self, ref: JobRef, count: int = WATCHERS) -> AsyncIterator[list[asyncio.Task[None]]]:
        """So many watchers of the whole history, each of which has its first message."""
        tasks = [asyncio.create_task(self._watch(ref)) for _ in range(count)]
        try:
            await self.until(lambda messages: bool(messages))
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _watch(self, ref: JobRef) -> None:
        messages: list[tuning_service_pb2.WatchTuningJobResponse] = []
        self.heard.append(messages)
        # One by one, as they come: others look at what is here meanwhile.
        async for message in self.follower.follow(ref, 0):
            messages += [message]

    async def until(self, told: object) -> None:
        assert callable(told)

        async def all_told() -> bool:
            return bool(self.heard) and all(told(messages) for messages in self.heard)

        await eventually(all_told)


@pytest.fixture
def crowd(world: World) -> Crowd:
    settings = world.settings.model_copy(update={"watch_batch_max": PER_MESSAGE_MAX})
    snapshots = QueueSnapshots(world.database, world.clock, settings)
    reader = CountingReader(world.database, JobView(world.database, snapshots), settings)
    feeds = JobFeeds(reader, world.hub, world.clock, settings)
    return Crowd(feeds=feeds, reader=reader, follower=Follower(feeds, reader, settings))


async def queued(world: World, count: int) -> list[JobRef]:
    """Jobs that came one second after the other."""
    refs: list[JobRef] = [await world.queued_job() for _ in range(count)]
    for number, ref in enumerate(refs):
        await world.pool.execute(
            "UPDATE jobs SET queue_time = now() + make_interval(secs => $1) WHERE job_id = $2", number, ref.job_id
        )
    return refs


def steps(messages: list[tuning_service_pb2.WatchTuningJobResponse]) -> list[int]:
    """Of the metric lines, in the order in which they were told."""
    return [event.progress.step for message in messages for event in message.events if event.HasField("progress")]


async def test_a_change_is_read_once_for_all_who_watch(world: World, crowd: Crowd) -> None:
    await world.add_node()
    lease = await world.running_job()
    async with crowd.watching(lease):
        before = crowd.reader.reads
        await world.reports.report(lease, [metric(1), metric(2)], [], [])
        await crowd.until(lambda messages: steps(messages) == [1, 2])
        assert crowd.reader.reads - before == 1


async def test_everybody_hears_all_lines_once_however_many_there_are(
    world: World, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_feed, "TAIL_EVENTS_MAX", 4)
    await world.add_node()
    lease = await world.running_job()
    await world.reports.report(lease, [metric(step) for step in range(1, 26)], [], [])
    async with crowd.watching(lease, 5):
        for start in (26, 29, 60):
            # More than the feed keeps, and at last more than one read brings.
            end = start + (3 if start < 29 else 31)
            await world.reports.report(lease, [metric(step) for step in range(start, end)], [], [])
            await crowd.until(lambda messages, end=end: steps(messages) == [*range(1, end)])
    assert crowd.reader.histories > 0


async def test_a_watch_ends_with_the_job_and_all_its_lines(world: World, crowd: Crowd) -> None:
    ref = await world.queued_job()
    async with crowd.watching(ref, 3) as tasks:
        await world.pool.execute("UPDATE jobs SET state = 'CANCELLED', end_time = now() WHERE job_id = $1", ref.job_id)
        # Nobody was told of it.
        await crowd.feeds.look_over()
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
    assert all(messages[-1].tuning_job.HasField("end_time") for messages in crowd.heard)


async def test_nobody_can_watch_what_is_not_there(world: World, crowd: Crowd) -> None:
    for _ in range(2):
        with pytest.raises(NotFound):
            async for _ in crowd.follower.follow(JobRef(project_id="proj_a", job_id="ft-none"), 0):
                pass


async def test_a_move_of_the_queue_is_told_without_reading_a_job(world: World, crowd: Crowd) -> None:
    first, second = await queued(world, 2)
    async with crowd.watching(second):
        assert {messages[-1].tuning_job.queue.position for messages in crowd.heard} == {2}
        await world.pool.execute("UPDATE jobs SET state = 'CANCELLED' WHERE job_id = $1", first.job_id)
        world.clock.jump(world.settings.queue_snapshot_s + 1)
        before = crowd.reader.reads
        await crowd.feeds.look_over()
        await crowd.until(lambda messages: messages[-1].tuning_job.queue.position == 1)
        assert crowd.reader.reads == before


async def test_the_queue_is_read_once_within_a_while_for_all_who_ask(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = 0
    queue_times = JobStore.queue_times

    async def counted(store: JobStore) -> list[float]:
        nonlocal scans
        scans += 1
        return await queue_times(store)

    monkeypatch.setattr(JobStore, "queue_times", counted)
    refs = await queued(world, 20)
    view = JobView(world.database, QueueSnapshots(world.database, world.clock, world.settings))
    for _ in range(2):
        shown = await asyncio.gather(*(view.one(ref) for ref in refs * 3))
        assert [job.queue.position for job in shown if job is not None] == [*range(1, 21)] * 3
    assert scans == 1
    await world.pool.execute("UPDATE jobs SET state = 'CANCELLED' WHERE job_id = $1", refs[0].job_id)
    world.clock.jump(world.settings.queue_snapshot_s + 1)
    last = await view.one(refs[-1])
    assert last is not None
    assert (last.queue.position, scans) == (19, 2)
