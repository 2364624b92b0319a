"""What the agent does when leases, schedulers, agents and children go away; each test pays one process start."""

import asyncio
import os
import resource
import signal

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis.errors import Aborted, DomainError, PermissionDenied
from tests.contract.trainer.world import AgentWorld, eventually, is_alive, wait_for_death
from tests.harness.scripted_scheduler import WAIT_S_MAX

# It never ends by itself within a test, however slow the machine.
LONG = {"steps": 100_000, "checkpoint_every": 10, "step_s": 0.02}


async def test_a_stale_lease_kills_the_child_and_nothing_is_stored_afterwards(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(**LONG)))
    pid = await world.wait_for_child()
    await world.scheduler.wait_for("commit")
    world.scheduler.stale.add(7)
    await world.scheduler.wait_until(lambda: bool(world.scheduler.refused))
    await wait_for_death(pid)
    await _until_idle(world)
    stored, accepted = world.stored(""), len(world.scheduler.reports)
    # Long enough for an upload or a report, which must not come.
    await asyncio.sleep(0.5)
    assert world.stored("") == stored
    assert len(world.scheduler.reports) == accepted
    committed = {commit.checkpoint.step for commit in world.scheduler.of("commit")}
    sent = committed | {request.checkpoint.step for kind, request in world.scheduler.refused if kind == "commit"}
    steps = {int(path.split("/checkpoints/")[1].split("-")[0]) for path in world.stored("jobs/proj_1/ft-1/checkpoints")}
    assert steps <= sent
    # The token is over for this agent, even while the scheduler still lists it.
    assert len(world.children()) == 1


async def test_an_assignment_that_is_gone_is_killed_without_a_report(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(**LONG)))
    pid = await world.wait_for_child()
    await world.scheduler.wait_for("progress")
    await world.scheduler.withdraw(7)
    await wait_for_death(pid)
    await _until_idle(world)
    assert world.scheduler.of("finish") == []


async def test_reports_survive_a_scheduler_that_is_away_in_order_and_once(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=60, checkpoint_every=10, step_s=0.02)))
    await world.scheduler.wait_for("progress")
    pid = await world.wait_for_child()
    await world.server.stop()
    # Away for as long as most of the steps take: reports fail meanwhile, and the agent tells nobody.
    await asyncio.sleep(1.0)
    await world.server.start()
    finish = await world.scheduler.wait_for("finish")

    assert finish.succeeded.step == 60
    assert world.scheduler.usage == [("train", start, start + 10, 100) for start in range(0, 60, 10)]
    assert world.scheduler.steps == list(range(1, 61))
    assert len(world.children()) == 1
    await world.scheduler.wait_until(lambda: len(world.scheduler.registrations) >= 2)
    assert len({registration.incarnation for registration in world.scheduler.registrations}) == 1
    assert not is_alive(pid)


async def test_each_kind_of_report_is_repeated_until_it_is_accepted(world: AgentWorld) -> None:
    world.scheduler.failures = {"start": 2, "progress": 2, "commit": 2, "finish": 2}
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4, checkpoint_every=2)))
    await world.scheduler.wait_for("finish")
    assert world.scheduler.usage == [("train", 0, 2, 20), ("train", 2, 4, 20)]
    assert [commit.checkpoint.step for commit in world.scheduler.of("commit")][-1] == 4


async def test_a_full_queue_holds_the_child_back_and_loses_nothing(world: AgentWorld) -> None:
    await world.start_agent(report_queue_max=2, report_metrics_max=3)
    world.scheduler.failures = {"progress": 4}
    await world.scheduler.assign(world.assignment(world.script(steps=200, checkpoint_every=1, step_s=0.0)))
    await world.scheduler.wait_for("finish", timeout_s=60)
    assert world.scheduler.usage == [("train", step, step + 1, 10) for step in range(200)]


@pytest.mark.parametrize("steps", [3_100, 12_000])
async def test_a_range_of_more_steps_than_one_report_takes_is_told_in_parts(world: AgentWorld, steps: int) -> None:
    """Its usage comes once, with the last of its steps."""
    world.scheduler.failures = {"progress": 2}
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=steps, checkpoint_every=steps, step_s=0.0)))
    assert (await world.scheduler.wait_for("finish")).succeeded.step == steps
    assert world.scheduler.usage == [("train", 0, steps, 10 * steps)]
    assert world.scheduler.steps == list(range(1, steps + 1))
    assert list(world.scheduler.of("progress")[-1].usage)


async def test_no_child_outlives_a_killed_agent(world: AgentWorld) -> None:
    agent = await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(**LONG)))
    pid = await world.wait_for_child()
    await world.scheduler.wait_for("progress")
    agent.send_signal(signal.SIGKILL)
    await agent.wait()
    await wait_for_death(pid)

    # The next incarnation clears what the killed one left and works on.
    left = list(world.work.iterdir())
    assert left
    await world.scheduler.withdraw(7)
    await world.start_agent()
    await world.scheduler.wait_until(lambda: len({r.incarnation for r in world.scheduler.registrations}) == 2)
    assert not any(path.exists() for path in left)
    await world.scheduler.assign(world.assignment(world.script(steps=2), token=8))
    assert (await world.scheduler.wait_for("finish")).succeeded.step == 2


async def test_a_killed_child_is_reported_retryable(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(**LONG)))
    pid = await world.wait_for_child()
    await world.scheduler.wait_for("commit")
    os.kill(pid, signal.SIGKILL)
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.retryable
    assert failed.error.platform_fault
    assert failed.error.reason == "TRAINING_FAILED"


async def test_a_stopped_agent_gives_its_lease_back(world: AgentWorld) -> None:
    agent = await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(**LONG)))
    pid = await world.wait_for_child()
    await world.scheduler.wait_for("progress")
    agent.send_signal(signal.SIGTERM)
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.retryable
    assert failed.error.metadata["drained"] == "true"
    assert await agent.wait() == 0
    assert not is_alive(pid)
    assert all(end % 10 == 0 for _, _, end, _ in world.scheduler.usage)


async def test_a_stopped_agent_does_not_wait_for_ever_for_a_scheduler_that_is_away(world: AgentWorld) -> None:
    agent = await world.start_agent(drain_grace_s=0.5)
    await world.scheduler.assign(world.assignment(world.script(**LONG)))
    pid = await world.wait_for_child()
    await world.scheduler.wait_for("progress")
    await world.server.stop()
    agent.send_signal(signal.SIGTERM)
    async with asyncio.timeout(60):
        await agent.wait()
    await wait_for_death(pid)
    await world.server.start()


async def test_a_node_is_healthy_once_its_scheduler_knows_it(world: AgentWorld) -> None:
    """Before, a job that needs it would be refused as too large for the nodes that are there."""
    await world.server.stop()
    await world.start_agent()
    async with world.channel() as channel:
        seen = aiter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(seen)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not world.scheduler.registrations
        await world.server.start()
        async with asyncio.timeout(WAIT_S_MAX):
            assert (await anext(seen)).status == health_pb2.HealthCheckResponse.SERVING
    assert world.scheduler.registrations


async def test_two_agents_cannot_share_a_node_folder(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.wait_until(lambda: bool(world.scheduler.registrations))
    second = await world.start_agent(port_file=world.folder / "second")
    assert await second.wait() == 1


@pytest.mark.parametrize(
    "refusal",
    [
        Aborted("LEASE_STALE", "another incarnation of this node is registered"),
        PermissionDenied("NODE_NOT_CERTIFIED", "the certificate is that of another node"),
    ],
)
async def test_an_agent_that_may_not_speak_for_its_node_stops_its_work(world: AgentWorld, refusal: DomainError) -> None:
    agent = await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(**LONG)))
    pid = await world.wait_for_child()
    world.scheduler.heartbeat_error = refusal
    await wait_for_death(pid)
    assert await agent.wait() == 1


async def test_heartbeats_carry_the_leases_that_are_worked_on(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(**LONG), token=11))
    await world.scheduler.wait_for("progress")
    before = len(world.scheduler.heartbeats)
    await world.scheduler.wait_until(lambda: len(world.scheduler.heartbeats) > before + 2)
    assert list(world.scheduler.heartbeats[-1].lease_tokens) == [11]
    registration = world.scheduler.registrations[0]
    assert registration.node == "local-0"
    assert registration.address == f"127.0.0.1:{int(world.port_file.read_text())}"
    assert [device.index for device in registration.devices] == list(range(len(registration.devices)))


async def _until_idle(world: AgentWorld) -> None:
    """The agent works on nothing: its heartbeats name no lease, and no folder is left."""
    before = len(world.scheduler.heartbeats)
    await world.scheduler.wait_until(
        lambda: any(not heartbeat.lease_tokens for heartbeat in world.scheduler.heartbeats[before:])
    )
    await eventually(lambda: not list(world.work.iterdir()))


async def test_a_full_disk_of_the_node_is_named_and_the_job_may_go_on_elsewhere(world: AgentWorld) -> None:
    """The kernel refuses to let a fetched file grow; nothing of it is left, and a later attempt finds room again."""
    agent = await world.start_agent()
    await world.scheduler.wait_until(lambda: bool(world.scheduler.registrations))
    unlimited = resource.prlimit(agent.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, (1024**2, unlimited[1]))
    script = world.script(steps=2, padding="x" * 2 * 1024**2)
    await world.scheduler.assign(world.assignment(script))
    failed = (await world.scheduler.wait_for("finish")).failed
    assert (failed.retryable, failed.error.reason, failed.error.platform_fault) == (True, "TRAINING_FAILED", True)
    assert "the disk of the node is full" in failed.error.message
    assert failed.error.metadata["cause"] == "disk_full"
    await _until_idle(world)
    assert world.children() == []
    resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, unlimited)
    await world.scheduler.assign(world.assignment(script, token=8))
    assert (await world.scheduler.wait_for("finish", 2)).succeeded.step == 2
