"""A job over several nodes: leases that live and end together, one of which speaks for all."""

import pytest

from chassis.errors import Aborted
from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from tests.contract.scheduler.agent import Agent
from tests.contract.scheduler.world import World

CRASH = tuning_job_pb2.JobError(reason="TRAINING_FAILED", message="a process died", platform_fault=True)


async def parts(
    one: Agent, other: Agent, after: node_pb2.Assignment | None = None
) -> tuple[tuple[Agent, node_pb2.Assignment], tuple[Agent, node_pb2.Assignment]]:
    """The leading node with its assignment, then the other one."""
    found = [(agent, await agent.assignment(after=after)) for agent in (one, other)]
    leading, following = sorted(found, key=lambda part: not part[1].gang.leads)
    return leading, following


async def test_two_nodes_get_their_parts_and_one_reports_for_both(world: World) -> None:
    async with world.agent(node="n1") as one, world.agent(node="n2") as other:
        name = await world.create(world.spec(gpu_count=2))
        (leader, leading), (follower, following) = await parts(one, other)
        assert (leading.gang.leads, following.gang.leads) == (True, False)
        assert leading.gang.node_count == following.gang.node_count == 2
        assert leading.gang.endpoint == following.gang.endpoint
        assert leading.gang.endpoint.startswith("127.0.0.1:29")
        assert leading.gang.id == following.gang.id
        assert following.lease.token > leading.lease.token
        assert following.lease.attempt == leading.lease.attempt == 1
        assert list(leading.device_indices) == list(following.device_indices) == [0]
        await leader.start(leading)
        with pytest.raises(Aborted) as refused:
            await follower.progress(following, 0, 10)
        assert refused.value.reason == "LEASE_STALE"
        await leader.progress(leading, 0, 20)
        await leader.succeed(leading)
        assert (await world.until(name, "SUCCEEDED")).attempt_count == 1
        await leader.idle()
        await follower.idle()
        # Both devices are free again.
        again = await world.create(world.spec(gpu_count=2))
        (leader, leading), _ = await parts(one, other)
        await leader.start(leading)
        await leader.succeed(leading)
        await world.until(again, "SUCCEEDED")


async def test_the_failure_of_one_node_ends_the_attempt_for_all(world: World) -> None:
    async with world.agent(node="n1") as one, world.agent(node="n2") as other:
        name = await world.create(world.spec(gpu_count=2))
        (leader, leading), (follower, following) = await parts(one, other)
        await leader.start(leading)
        await leader.progress(leading, 0, 10)
        await leader.checkpoint(leading, 10)
        await follower.fail(following, CRASH, retryable=True)
        with pytest.raises(Aborted):
            await leader.progress(leading, 10, 20)
        await world.when(name, lambda job: job.attempt_count == 2)
        last = max(leading, following, key=lambda part: part.lease.token)
        (leader, again), (_, following) = await parts(one, other, last)
        assert again.resume_from.step == following.resume_from.step == 10
        assert again.gang.id != leading.gang.id
        await leader.start(again)
        await leader.succeed(again)
        await world.until(name, "SUCCEEDED")


@pytest.mark.parametrize("lost", ["leading", "following"])
async def test_a_lost_node_ends_the_attempt_for_all(world: World, lost: str) -> None:
    async with world.agent(node="n1") as one, world.agent(node="n2") as other:
        name = await world.create(world.spec(gpu_count=2))
        (leader, leading), (follower, following) = await parts(one, other)
        await leader.start(leading)
        crashed, stays = (leader, follower) if lost == "leading" else (follower, leader)
        await crashed.crash()
        await stays.idle()
        with pytest.raises(Aborted):
            await leader.progress(leading, 0, 10)
        async with world.agent(node=crashed.node) as back:
            (leader, again), (_, following) = await parts(stays, back)
            assert again.lease.attempt == following.lease.attempt == 2
            await leader.start(again)
            await leader.succeed(again)
            await world.until(name, "SUCCEEDED")


async def test_a_cancellation_reaches_all_nodes(world: World) -> None:
    async with world.agent(node="n1") as one, world.agent(node="n2") as other:
        name = await world.create(world.spec(gpu_count=2))
        (leader, leading), (follower, _) = await parts(one, other)
        await leader.start(leading)
        await world.cancel(name)
        await leader.assignment(cancelled=True)
        await follower.assignment(cancelled=True)
        await leader.stop(leading, 0)
        await world.until(name, "CANCELLED")
        await follower.idle()
