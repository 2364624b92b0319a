"""Children that wait with their libraries loaded: used once, replaced, bounded, and never in the way of an attempt."""

import asyncio
import os
import signal
from typing import Any

import psutil

from tests.contract.trainer.world import AgentWorld, eventually, is_alive, wait_for_death

WARM: dict[str, Any] = {"warm_memory_bytes_max": 1024**3}


def waiting(agent: asyncio.subprocess.Process) -> list[int]:
    """Children of the agent that were started to wait, also those that have got work."""
    try:
        children = psutil.Process(agent.pid).children()
        return [child.pid for child in children if "--wait" in child.cmdline()]
    except psutil.Error:
        return []


async def one_waiting(agent: asyncio.subprocess.Process, other_than: int = 0) -> int:
    await eventually(lambda: set(waiting(agent)) not in (set(), {other_than}))
    (pid,) = set(waiting(agent)) - {other_than}
    return pid


async def test_an_attempt_takes_the_waiting_child_and_another_waits_afterwards(world: AgentWorld) -> None:
    agent = await world.start_agent(**WARM)
    first = await one_waiting(agent)
    await world.scheduler.assign(world.assignment(world.script(steps=4), token=1))
    assert (await world.scheduler.wait_for("finish")).succeeded.step == 4
    second = await one_waiting(agent, other_than=first)
    await world.scheduler.assign(world.assignment(world.script(steps=4), token=2, job="ft-2"))
    assert (await world.scheduler.wait_for("finish", 2)).succeeded.step == 4
    assert [pid for pid, _ in world.children()] == [first, second]
    # Each worked in the folder of its own attempt.
    assert [folder.name for _, folder in world.children()] == ["ft-1-1", "ft-2-2"]


async def test_nothing_waits_while_the_device_is_taken(world: AgentWorld) -> None:
    agent = await world.start_agent(**WARM)
    first = await one_waiting(agent)
    await world.scheduler.assign(world.assignment(world.script(steps=100_000, checkpoint_every=10, step_s=0.02)))
    await world.scheduler.wait_for("commit", 2)
    assert waiting(agent) == [first]


async def test_a_waiting_child_that_died_costs_nothing_but_its_time(world: AgentWorld) -> None:
    agent = await world.start_agent(**WARM)
    pid = await one_waiting(agent)
    os.kill(pid, signal.SIGKILL)
    await wait_for_death(pid)
    await world.scheduler.assign(world.assignment(world.script(steps=4)))
    assert (await world.scheduler.wait_for("finish")).succeeded.step == 4
    assert world.children()[0][0] != pid


async def test_no_child_waits_that_holds_more_than_it_may(world: AgentWorld) -> None:
    agent = await world.start_agent(warm_memory_bytes_max=1024**2)
    await eventually(lambda: b"warm_children_over_memory_limit" in (world.folder / "agent.log").read_bytes())
    await eventually(lambda: waiting(agent) == [])
    await world.scheduler.assign(world.assignment(world.script(steps=4)))
    assert (await world.scheduler.wait_for("finish")).succeeded.step == 4


async def test_a_child_that_cannot_wait_is_not_waited_for(world: AgentWorld) -> None:
    """`this` prints a poem and ends: no event, no ready child, and no second try until an attempt has run."""
    agent = await world.start_agent(**WARM, child_module="this")
    await eventually(lambda: b"warm_child_not_kept" in (world.folder / "agent.log").read_bytes())
    assert waiting(agent) == []
    await world.scheduler.assign(world.assignment(world.script(steps=4)))
    assert (await world.scheduler.wait_for("finish")).failed.error.platform_fault


async def test_a_waiting_child_dies_with_its_agent(world: AgentWorld) -> None:
    agent = await world.start_agent(**WARM)
    pid = await one_waiting(agent)
    agent.send_signal(signal.SIGKILL)
    await wait_for_death(pid)

    again = await world.start_agent(**WARM)
    pid = await one_waiting(again)
    again.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(again.wait(), 60) == 0
    assert not is_alive(pid)
