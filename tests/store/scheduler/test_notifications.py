"""A notification makes all commits take turns, so only what somebody may wait for in another process is notified."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from services.scheduler.watching.hub import QUEUE_TOPIC, job_topic, node_topic
from services.scheduler.watching.store import PAYLOAD_BYTES_MAX, SEPARATOR, payloads
from tests.store.scheduler.world import World, checkpoint, metric


@asynccontextmanager
async def heard(world: World) -> AsyncIterator[list[str]]:
    """What a scheduler process is notified of meanwhile."""
    connection = await asyncpg.connect(world.settings.database_url)
    payloads: list[str] = []
    ended = asyncio.Event()

    def hear(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        payloads.append(str(payload))
        if payload == "end":
            ended.set()

    await connection.add_listener("scheduler", hear)
    yield payloads
    await world.pool.execute("SELECT pg_notify('scheduler', 'end')")
    async with asyncio.timeout(30):
        await ended.wait()
    payloads.remove("end")
    await connection.close()


async def test_reports_notify_nobody_and_wake_who_watches_here(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    async with heard(world) as told:
        with world.hub.listening(job_topic(lease.job_id)) as signal:
            await world.reports.report(lease, [metric(1)], [], ["a warning"])
            async with asyncio.timeout(5):
                await signal.wait()
            await world.reports.commit(lease, checkpoint(1))
            async with asyncio.timeout(5):
                await signal.wait()
    assert told == []


async def test_a_transition_is_one_notification_and_rings_the_queue_only_where_it_moves(world: World) -> None:
    await world.add_node()
    lease = await world.placed_job()
    topic = job_topic(lease.job_id)
    async with heard(world) as told:
        await world.reports.start(lease)
    assert told == [topic]
    async with heard(world) as told:
        ref = await world.new_job()
    assert told == [SEPARATOR.join([QUEUE_TOPIC, job_topic(ref.job_id)])]


async def test_a_transaction_rings_once_for_all_that_it_changes(world: World) -> None:
    await world.add_node(devices=2)
    leases = [await world.running_job() for _ in range(2)]
    async with heard(world) as told:
        # A new start of the agent ends both leases and sends both jobs back into the queue.
        await world.add_node(devices=2, incarnation="i2", listens=False)
    assert len(told) == 1
    assert set(told[0].split(SEPARATOR)) == {
        QUEUE_TOPIC,
        node_topic("n1"),
        *(job_topic(lease.job_id) for lease in leases),
    }


def test_more_topics_than_one_notification_takes_are_split() -> None:
    topics = [job_topic(f"ft-{number:030}") for number in range(1000)]
    split = list(payloads(topics))
    assert max(len(payload) for payload in split) <= PAYLOAD_BYTES_MAX
    assert SEPARATOR.join(split).split(SEPARATOR) == topics
    assert len(split) == 5


async def test_a_change_that_is_rolled_back_wakes_nobody(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    with world.hub.listening(job_topic(lease.job_id)) as signal:
        try:
            async with world.database.writing():
                world.database.tell(job_topic(lease.job_id))
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert not signal._sent.is_set()
