"""An agent whose node follows in a gang: it runs its processes, says nothing but that they failed,
and goes when it is told to."""

import asyncio
import os
import signal

from finemesh.nodes.v1 import node_pb2
from tests.contract.trainer.world import AgentWorld, eventually, is_alive, wait_for_death
from tests.harness.scripted_scheduler import WAIT_S_MAX

PART = node_pb2.GangPart(node_count=2, leads=False, endpoint="127.0.0.1:29400", id="ft-1-6", address="127.0.0.1")


async def some_heartbeats(world: AgentWorld) -> None:
    """So many that an ending would have been told."""
    seen = len(world.scheduler.heartbeats)
    await world.scheduler.wait_until(lambda: len(world.scheduler.heartbeats) > seen + 10)


async def test_it_is_silent_and_keeps_its_lease_until_it_is_taken_away(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4), gang=PART))
    child = await world.wait_for_child()
    await wait_for_death(child)
    # Its processes are done; the leading node still stores the model.
    await some_heartbeats(world)
    assert world.scheduler.reports == []
    assert list(world.scheduler.heartbeats[-1].lease_tokens) == [7]
    assert world.stored("jobs/proj_1") == []
    await world.scheduler.withdraw(7)
    await eventually(lambda: list(world.scheduler.heartbeats[-1].lease_tokens) == [])
    assert world.scheduler.reports == []


async def test_the_death_of_a_process_is_told(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4, hang_at_step=2), gang=PART))
    os.kill(await world.wait_for_child(), signal.SIGKILL)
    finish = await world.scheduler.wait_for("finish")
    assert (finish.lease_token, finish.failed.retryable) == (7, True)
    assert [kind for kind, _ in world.scheduler.reports] == ["finish"]


async def test_a_failure_of_its_own_is_told_with_its_reason(world: AgentWorld) -> None:
    await world.start_agent()
    script = world.script(steps=4, fail_platform_at_step=2, cause="disk_full")
    await world.scheduler.assign(world.assignment(script, gang=PART))
    error = (await world.scheduler.wait_for("finish")).failed.error
    assert (error.reason, error.message, error.metadata["cause"]) == ("TRAINING_FAILED", "as scripted", "disk_full")
    assert error.platform_fault


async def test_why_a_peer_is_gone_is_left_to_its_own_node(world: AgentWorld) -> None:
    """Else "a peer is gone" could come before the reason, and the first word ends the attempt."""
    await world.start_agent()
    script = world.script(steps=4, fail_platform_at_step=2, cause="lost_peer")
    await world.scheduler.assign(world.assignment(script, gang=PART))
    await wait_for_death(await world.wait_for_child())
    await some_heartbeats(world)
    assert world.scheduler.reports == []
    await world.scheduler.withdraw(7)
    await eventually(lambda: list(world.scheduler.heartbeats[-1].lease_tokens) == [])


async def test_what_the_user_has_to_mend_is_left_to_the_leading_node(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4, fail_user_at_step=2), gang=PART))
    await wait_for_death(await world.wait_for_child())
    await some_heartbeats(world)
    assert world.scheduler.reports == []
    await world.scheduler.withdraw(7)
    await eventually(lambda: list(world.scheduler.heartbeats[-1].lease_tokens) == [])


async def test_a_lost_attempt_kills_its_processes(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4, hang_at_step=1), gang=PART))
    child = await world.wait_for_child()
    await world.scheduler.withdraw(7)
    await wait_for_death(child)
    assert not is_alive(child)
    assert world.scheduler.reports == []


async def test_a_node_that_goes_away_gives_the_whole_attempt_back(world: AgentWorld) -> None:
    agent = await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4, hang_at_step=1), gang=PART))
    child = await world.wait_for_child()
    agent.send_signal(signal.SIGTERM)
    failed = (await world.scheduler.wait_for("finish")).failed
    assert (failed.retryable, failed.error.metadata["drained"]) == (True, "true")
    assert await agent.wait() == 0
    assert not is_alive(child)


async def test_a_node_that_goes_away_after_its_processes_are_done_fails_nothing(world: AgentWorld) -> None:
    """The leading node still stores the model. Nothing is left here that the agent would have to wait for."""
    agent = await world.start_agent(drain_grace_s=600)
    await world.scheduler.assign(world.assignment(world.script(steps=4), gang=PART))
    await wait_for_death(await world.wait_for_child())
    await some_heartbeats(world)
    agent.send_signal(signal.SIGTERM)
    async with asyncio.timeout(WAIT_S_MAX):
        assert await agent.wait() == 0
    assert world.scheduler.reports == []
