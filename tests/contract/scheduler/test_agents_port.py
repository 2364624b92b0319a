"""What keeps leases has a port, a pool and caps of its own: users cannot starve it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio

from chassis.errors import NotFound, PermissionDenied, ResourceExhausted, Unimplemented
from chassis.identity import acting_as
from chassis.rpc.channel import open_channel
from finemesh.allocations.v1 import allocation_service_pb2
from finemesh.nodes.v1 import node_service_pb2, node_service_pb2_grpc
from finemesh.tuning.v1 import tuning_service_pb2, tuning_service_pb2_grpc
from tests.contract.scheduler.peers import AWAY
from tests.contract.scheduler.world import OWNER, World, running_world
from tests.harness.fixtures import SettingsFactory
from tests.harness.polling import eventually

POOL_SIZE_MAX = 3


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def narrow(make_settings: SettingsFactory, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One stream and few connections for users."""
    port_file: Path = tmp_path_factory.mktemp("narrow") / "port"
    async with running_world(make_settings, port_file, streams_max=1, pool_size_max=POOL_SIZE_MAX) as world:
        yield world


async def test_users_fill_their_streams_and_agents_are_heard(narrow: World) -> None:
    name = await narrow.create()
    with acting_as(OWNER):
        watching = narrow.tuning.WatchTuningJob(tuning_service_pb2.WatchTuningJobRequest(name=name))
        await watching.read()
        another = narrow.tuning.WatchTuningJob(tuning_service_pb2.WatchTuningJobRequest(name=name))
        with pytest.raises(ResourceExhausted) as caught:
            await another.read()
    assert caught.value.metadata["limit"] == "streams_max"
    async with narrow.agent() as agent:
        assert (await agent.assignment()).lease.tuning_job == name
    watching.cancel()
    await narrow.cancel(name)


async def test_users_hold_their_connections_and_agents_are_heard(narrow: World) -> None:
    # The job stays where it is: the placer would wait for its row, and a registration for the placer.
    narrow.script.analysis_error = AWAY
    name = await narrow.create()
    connection = await asyncpg.connect(narrow.settings.database_url)
    calls: list[asyncio.Task[object]] = []
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM jobs WHERE job_id = $1 FOR UPDATE", name.rpartition("/")[2])
            calls = [asyncio.create_task(narrow.cancel(name)) for _ in range(POOL_SIZE_MAX)]

            async def waiting() -> int:
                return await connection.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND wait_event_type = 'Lock'"
                )

            await eventually(waiting, lambda count: count >= POOL_SIZE_MAX)
            async with narrow.agent(node="n2") as agent:
                await agent.register()
            request = allocation_service_pb2.ReleaseAllocationRequest(owner="projects/p/endpoints/e", lease_token=1)
            await narrow.allocations.ReleaseAllocation(request)
    finally:
        await connection.close()
        await asyncio.gather(*calls, return_exceptions=True)
        narrow.script.analysis_error = None


async def test_each_port_offers_its_own(narrow: World) -> None:
    async with (
        open_channel(narrow.make_settings("trainer"), narrow.target, "scheduler") as for_users,
        open_channel(narrow.make_settings("gateway"), narrow.agents_target, "scheduler") as for_agents,
    ):
        with pytest.raises(Unimplemented):
            await node_service_pb2_grpc.NodeServiceStub(for_users).RegisterNode(node_service_pb2.RegisterNodeRequest())
        with pytest.raises(PermissionDenied):
            await node_service_pb2_grpc.NodeServiceStub(for_agents).RegisterNode(node_service_pb2.RegisterNodeRequest())
        with acting_as(OWNER), pytest.raises(Unimplemented):
            stub = tuning_service_pb2_grpc.TuningServiceStub(for_agents)
            await stub.GetTuningJob(tuning_service_pb2.GetTuningJobRequest(name="projects/proj_a/tuningJobs/ft-1"))
    with pytest.raises(NotFound):
        await narrow.get("projects/proj_a/tuningJobs/ft-1")
