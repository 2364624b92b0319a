"""A heartbeat whose stream breaks: what ended the reading is told once, to the agent or to the log. Who may join."""

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import InvalidArgument, ResourceExhausted
from services.scheduler.config import SchedulerSettings
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.nodes.heartbeats import Heartbeats
from services.scheduler.nodes.node import Beat
from services.scheduler.placement.store import AllocationStore
from tests.harness.polling import eventually
from tests.store.scheduler.world import World, fresh_world

OWN = Beat(node="n1", incarnation="i1", lease_tokens=())
FOREIGN = Beat(node="n1", incarnation="i2", lease_tokens=())


class Agent:
    """Says a beat, and whatever makes the reading fail once it is told to."""

    def __init__(self, failure: Exception | None) -> None:
        self.goes_on, self.failed = asyncio.Event(), asyncio.Event()
        self._failure = failure

    async def beats(self) -> AsyncIterator[Beat]:
        yield OWN
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            # As a statement does whose connection dies while it is cancelled.
            if self._failure is None:
                raise
            raise self._failure from None
        # The reader fails before the next pass of the loop ends, and so before whoever waits for this goes on.
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, self.failed.set)
        if self._failure is not None:
            raise self._failure
        yield FOREIGN


def heartbeats_of(world: World) -> Heartbeats:
    return Heartbeats(world.database, world.nodes, world.hub, world.settings)


@pytest.mark.parametrize("fails_first", [True, False])
@pytest.mark.parametrize(
    ("failure", "level", "name"),
    [
        (InvalidArgument("INVALID_FIELD", "no such token"), "warning", "InvalidArgument"),
        (ConnectionResetError("away"), "warning", "ConnectionResetError"),
        (ZeroDivisionError(), "error", "ZeroDivisionError"),
    ],
)
async def test_what_ended_the_reading_of_a_broken_stream_is_logged_once(
    world: World, failure: Exception, level: str, name: str, fails_first: bool
) -> None:
    await world.add_node(listens=False)
    agent, never_retrieved, loop = Agent(failure), list[dict[str, Any]](), asyncio.get_running_loop()
    # What other tests left behind is told before this one listens.
    gc.collect()
    loop.set_exception_handler(lambda _, context: never_retrieved.append(context))
    try:
        with capture_logs() as lines:
            answers = heartbeats_of(world).converse(agent.beats(), world.ids.uuid())
            await anext(answers)
            if fails_first:
                agent.goes_on.set()
                await agent.failed.wait()
            # As the server does when the connection is gone.
            await answers.aclose()  # type: ignore[attr-defined]
            del answers
            await asyncio.sleep(0)
            gc.collect()
    finally:
        loop.set_exception_handler(None)
    assert never_retrieved == []
    (told,) = [line for line in lines if line["event"] == "heartbeat_broken"]
    assert (told["node"], told["log_level"]) == ("n1", level)
    assert name in repr(told.get("error") or told["exc_info"])
    assert await world.pool.fetchval("SELECT heartbeat_stream FROM nodes") is None


async def test_an_agent_that_is_there_is_told_and_the_log_is_not(world: World) -> None:
    await world.add_node(listens=False)
    agent = Agent(None)
    with capture_logs() as lines:
        answers = heartbeats_of(world).converse(agent.beats(), world.ids.uuid())
        await anext(answers)
        agent.goes_on.set()
        with pytest.raises(InvalidArgument):
            await anext(answers)
    assert "heartbeat_broken" not in {line["event"] for line in lines}


async def test_a_node_whose_call_is_cancelled_while_it_is_closed_listens_no_longer(world: World) -> None:
    """The end of the stream is read first, and the server cancels the call a moment later."""
    await world.add_node(listens=False)
    agent = Agent(None)

    async def serve() -> None:
        async for _ in heartbeats_of(world).converse(agent.beats(), world.ids.uuid()):
            answered.set()

    answered = asyncio.Event()
    call = asyncio.create_task(serve())
    await answered.wait()
    async with transaction(world.pool) as connection:
        await connection.execute("SELECT FROM nodes FOR UPDATE")
        agent.goes_on.set()
        await eventually(lambda: somebody_waits(connection))
        call.cancel()
        await asyncio.wait([call])
    await eventually(lambda: listens_no_longer(world))


async def test_a_node_that_was_lost_by_mistake_listens_again_on_the_stream_it_has(world: World) -> None:
    """It beats as before and notices nothing; without its stream it would get no job until it connects anew."""
    await world.add_node(listens=False)
    again, stream = asyncio.Event(), world.ids.uuid()

    async def beats() -> AsyncIterator[Beat]:
        yield OWN
        await again.wait()
        yield OWN
        await asyncio.Event().wait()

    answers = heartbeats_of(world).converse(beats(), stream)
    await anext(answers)
    await world.pool.execute("UPDATE nodes SET seen_at = seen_at - interval '20 s'")
    async with world.database.writing() as connection:
        at = await AllocationStore(connection).time()
        assert await world.nodes.lose_silent(connection, at=at, silence_s_max=10.0) == ["n1"]
    ref = await world.queued_job()
    assert not await world.placer.place_round()
    again.set()
    await anext(answers)
    assert await world.pool.fetchval("SELECT heartbeat_stream FROM nodes WHERE state = 'READY'") == stream
    await world.placer.place_round()
    assert (await world.job(ref)).state is JobState.STARTING
    await answers.aclose()  # type: ignore[attr-defined]


async def somebody_waits(connection: Connection) -> bool:
    """For a lock."""
    return bool(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))


async def listens_no_longer(world: World) -> bool:
    return await world.pool.fetchval("SELECT heartbeat_stream FROM nodes") is None


async def test_a_node_that_would_get_no_jobs_is_told_so(scheduler_pool: tuple[Pool, SchedulerSettings]) -> None:
    pool, settings = scheduler_pool
    world = await fresh_world(pool, settings.model_copy(update={"nodes_max": 2}))
    await world.add_node("n1")
    await world.add_node("n2")
    with pytest.raises(ResourceExhausted, match="nodes_max"):
        await world.add_node("n3")
    assert await pool.fetchval("SELECT count(*) FROM nodes") == 2
    await world.add_node("n2", incarnation="i2")
    await pool.execute("UPDATE nodes SET state = 'LOST' WHERE node = 'n1'")
    await world.add_node("n3")
