"""Devices for serving over the wire: idempotent by owner, fenced by token, under the same constraint as training."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from chassis.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from finemesh.allocations.v1 import allocation_service_pb2
from tests.contract.scheduler.world import World, state_name

_pb = allocation_service_pb2
OWNER = "projects/proj_a/endpoints/ep_1"


async def take(world: World, owner: str = OWNER, count: int = 1, node: str = "") -> _pb.CreateAllocationResponse:
    response: _pb.CreateAllocationResponse = await world.allocations.CreateAllocation(
        _pb.CreateAllocationRequest(owner=owner, device_count=count, node=node)
    )
    return response


async def give_back(world: World, owner: str, token: int) -> None:
    await world.allocations.ReleaseAllocation(_pb.ReleaseAllocationRequest(owner=owner, lease_token=token))


@asynccontextmanager
async def kept(world: World, owner: str, token: int) -> AsyncIterator[None]:
    """In force for as long as the block lasts."""

    async def renew() -> None:
        while True:
            await world.allocations.RenewAllocation(_pb.RenewAllocationRequest(owner=owner, lease_token=token))
            # The pace of a renewal, not a wait for something.
            await asyncio.sleep(0.2)

    renewing = asyncio.create_task(renew())
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.wait([renewing])


async def test_serving_takes_waits_and_gives_back(world: World) -> None:
    async with world.agent(node="serves") as agent:
        first = (await take(world)).allocation
        assert (first.node, list(first.device_indices), first.hardware_type) == ("serves", [0], "cpu")
        assert (await take(world)).allocation.lease_token == first.lease_token
        other = await take(world, "projects/proj_a/endpoints/ep_2")
        assert not other.HasField("allocation")
        assert "0 of 1 free on serves" in other.waiting_for
        async with kept(world, OWNER, first.lease_token):
            name = await world.create()
            queued = await world.until(name, "QUEUED")
            assert "0 of 1 free" in queued.queue.waiting_for
        await give_back(world, OWNER, first.lease_token)
        await give_back(world, OWNER, first.lease_token)
        assignment = await agent.assignment()
        assert not (await take(world)).HasField("allocation")
        await agent.start(assignment)
        await agent.succeed(assignment)
        assert state_name(await world.until(name, "SUCCEEDED")) == "SUCCEEDED"
        again = (await take(world)).allocation
        assert again.lease_token > first.lease_token
        with pytest.raises(Aborted) as refused:
            await world.allocations.RenewAllocation(
                _pb.RenewAllocationRequest(owner=OWNER, lease_token=first.lease_token)
            )
        assert refused.value.reason == "LEASE_STALE"
        renewed = await world.allocations.RenewAllocation(
            _pb.RenewAllocationRequest(owner=OWNER, lease_token=again.lease_token)
        )
        assert renewed.allocation.expire_time.ToNanoseconds() > again.expire_time.ToNanoseconds()
        await give_back(world, OWNER, again.lease_token)


async def test_an_allocation_that_is_not_renewed_ends(world: World) -> None:
    async with world.agent(node="serves") as agent:
        owner = "projects/proj_a/endpoints/ep_3"
        token = (await take(world, owner)).allocation.lease_token
        assert token
        name = await world.create()
        assignment = await agent.assignment()
        with pytest.raises(Aborted):
            await world.allocations.RenewAllocation(_pb.RenewAllocationRequest(owner=owner, lease_token=token))
        await agent.start(assignment)
        await agent.succeed(assignment)
        await world.until(name, "SUCCEEDED")


async def test_devices_come_from_the_node_that_the_owner_runs_on(world: World) -> None:
    here, there = "projects/proj_a/endpoints/ep_5", "nodes/two-devices/engines/inf_1-rv_2"
    async with world.agent(node="one-device"), world.agent(node="two-devices", devices=2):
        for _ in range(2):
            given = (await take(world, here, node="one-device")).allocation
            assert (given.node, given.hardware_type) == ("one-device", "cpu")
            assert given.lease_duration.ToMilliseconds() == world.settings.lease_duration_s * 1000
        async with kept(world, here, given.lease_token):
            # What is free elsewhere is of no use to a process that runs here.
            other = await take(world, "projects/proj_a/endpoints/ep_6", node="one-device")
            assert "0 of 1 free on one-device" in other.waiting_for
            both = (await take(world, there, 2, node="two-devices")).allocation
            assert (both.node, list(both.device_indices)) == ("two-devices", [0, 1])
        with pytest.raises(FailedPrecondition, match="another could"):
            await take(world, "projects/proj_a/endpoints/ep_6", 2, node="one-device")
        with pytest.raises(NotFound, match="not registered"):
            await take(world, "projects/proj_a/endpoints/ep_6", node="nobody")
        with pytest.raises(InvalidArgument, match="2 are registered"):
            await take(world, "projects/proj_a/endpoints/ep_6")
        with pytest.raises(ResourceExhausted):
            await take(world, "projects/proj_a/endpoints/ep_6", 64, node="one-device")
        with pytest.raises(InvalidArgument):
            await take(world, "nodes/two-devices/engines/../x", node="two-devices")
        await give_back(world, here, given.lease_token)
        await give_back(world, there, both.lease_token)


async def test_what_no_node_could_give_is_refused(world: World) -> None:
    async with world.agent(node="serves"):
        with pytest.raises(ResourceExhausted) as refused:
            await take(world, "projects/proj_a/endpoints/ep_4", 64)
        assert refused.value.reason == "CAPACITY_EXHAUSTED"
        with pytest.raises(InvalidArgument):
            await take(world, "nonsense")
