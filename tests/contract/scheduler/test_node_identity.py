"""A node is who its certificate says: it registers, beats, reports and fetches secrets for itself alone."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from chassis import pki
from chassis.errors import Aborted, PermissionDenied
from chassis.identity import acting_as
from chassis.rpc.channel import open_channel
from deploy.certificates import hand_over
from finemesh.allocations.v1 import allocation_service_pb2, allocation_service_pb2_grpc
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2, tuning_secrets_pb2, tuning_service_pb2
from tests.contract.scheduler.agent import Agent
from tests.contract.scheduler.world import OWNER, World, running_world
from tests.harness.fixtures import SettingsFactory

SECRETS = tuning_secrets_pb2.TuningSecrets(wandb_api_key="wandb-key-1")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def keeping(make_settings: SettingsFactory, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A scheduler that may keep secrets."""
    port_file: Path = tmp_path_factory.mktemp("keeping") / "port"
    async with running_world(make_settings, port_file, secrets_key="0123456789abcdef" * 3) as world:
        yield world


def registration(node: str) -> node_service_pb2.RegisterNodeRequest:
    return node_service_pb2.RegisterNodeRequest(
        node=node, incarnation="i", address="127.0.0.1:1", devices=[node_pb2.Device(index=0, hardware_type="cpu")]
    )


async def refusal(call: Awaitable[object]) -> PermissionDenied:
    with pytest.raises(PermissionDenied) as caught:
        await call
    assert caught.value.reason == "NODE_NOT_CERTIFIED"
    return caught.value


async def test_a_node_registers_and_lives_as_itself_only(keeping: World) -> None:
    async with keeping.agent(node="n1") as one, keeping.agent(node="n2"):
        told = await refusal(one.stub.RegisterNode(registration("n2")))
        assert told.metadata == {"node": "n2", "certified": "n1"}
        assert "trainer@n2" in told.message
        stream = one.stub.Heartbeat(timeout=30)
        await stream.write(node_service_pb2.HeartbeatRequest(node="n2", incarnation="i"))
        await refusal(stream.read())
        await refusal(one.stub.ClaimJobFolders(node_service_pb2.ClaimJobFoldersRequest(node="n2")))
        await refusal(one.stub.FinishJobFolder(node_service_pb2.FinishJobFolderRequest(node="n2")))

        # A stream that began as one node does not go on as another.
        stream = one.stub.Heartbeat(timeout=30)
        await stream.write(node_service_pb2.HeartbeatRequest(node="n1", incarnation=one.incarnation))
        await stream.read()
        await stream.write(node_service_pb2.HeartbeatRequest(node="n2", incarnation="i"))
        await refusal(stream.read())


async def test_a_certificate_of_no_node_is_that_of_none(keeping: World) -> None:
    async with open_channel(keeping.make_settings("trainer"), keeping.agents_target, "scheduler") as channel:
        stub = node_service_pb2_grpc.NodeServiceStub(channel)
        told = await refusal(stub.RegisterNode(registration("n3")))
    assert told.metadata == {"node": "n3", "certified": ""}


async def test_leases_and_secrets_are_for_the_node_that_holds_them(keeping: World) -> None:
    async with keeping.agent(node="n1") as holder:
        name = await create(keeping)
        assignment = await holder.assignment()
        async with keeping.agent(node="n2") as other:
            for call in reports(other, name, assignment.lease.token):
                await refusal(call)
            job = await keeping.get(name)
            assert job.state == tuning_job_pb2.TUNING_JOB_STATE_STARTING
        await holder.start(assignment)
        fetch = node_service_pb2.FetchJobSecretsRequest(tuning_job=name, lease_token=assignment.lease.token)
        assert (await holder.stub.FetchJobSecrets(fetch)).secrets == SECRETS
        # A token that nobody was ever given is stale, as before.
        with pytest.raises(Aborted):
            await holder.start(node_pb2.Assignment(lease=node_pb2.Lease(token=10**12, tuning_job=name)))
        await holder.succeed(assignment)
        await keeping.until(name, "SUCCEEDED")


@asynccontextmanager
async def inference_of(world: World, node: str) -> AsyncIterator[Any]:
    """Inference with a certificate that names its node, made as `python -m deploy.certificates` does."""
    authority, name = world.make_settings().tls_dir, f"inference@{node}"
    pki.issue(authority, name)
    hand_over(authority, name, authority / name)
    settings = world.make_settings("inference", tls_dir=authority / name)
    async with open_channel(settings, world.agents_target, "scheduler") as channel:
        yield allocation_service_pb2_grpc.AllocationServiceStub(channel)


async def test_inference_with_the_certificate_of_a_node_has_the_devices_of_that_node_alone(keeping: World) -> None:
    pb, owner = allocation_service_pb2, "projects/proj_a/endpoints/ep_1"
    async with (
        keeping.agent(node="n1"),
        keeping.agent(node="n2"),
        inference_of(keeping, "n1") as own,
        inference_of(keeping, "n2") as other,
    ):
        given = (await own.CreateAllocation(pb.CreateAllocationRequest(owner=owner, node="n1"))).allocation
        told = await refusal(own.CreateAllocation(pb.CreateAllocationRequest(owner=owner, node="n2")))
        assert "inference@n2" in told.message
        named: dict[str, Any] = {"owner": owner, "lease_token": given.lease_token}
        await refusal(other.RenewAllocation(pb.RenewAllocationRequest(**named)))
        await refusal(other.ReleaseAllocation(pb.ReleaseAllocationRequest(**named)))
        await own.RenewAllocation(pb.RenewAllocationRequest(**named))
        await own.ReleaseAllocation(pb.ReleaseAllocationRequest(**named))
        # A certificate that names no node is for all of inference, as before.
        again = await keeping.allocations.CreateAllocation(pb.CreateAllocationRequest(owner=owner, node="n1"))
        named["lease_token"] = again.allocation.lease_token
        await keeping.allocations.RenewAllocation(pb.RenewAllocationRequest(**named))
        await keeping.allocations.ReleaseAllocation(pb.ReleaseAllocationRequest(**named))
        with pytest.raises(Aborted):
            await own.RenewAllocation(pb.RenewAllocationRequest(**named))


async def create(world: World) -> str:
    spec = world.spec()
    spec.integrations.wandb.project = "curves"
    with acting_as(OWNER):
        answer = await world.tuning.CreateTuningJob(
            tuning_service_pb2.CreateTuningJobRequest(spec=spec, secrets=SECRETS)
        )
    name: str = answer.tuning_job.name
    return name


def reports(agent: Agent, name: str, token: int) -> list[Awaitable[object]]:
    """All that is said under a lease."""
    ids: dict[str, Any] = {"tuning_job": name, "lease_token": token}
    stub, pb = agent.stub, node_service_pb2
    artifact = artifact_pb2.Artifact(key="x/", files=[artifact_pb2.ArtifactFile(path="a", size_bytes=1, sha256="00")])
    checkpoint = node_pb2.CheckpointManifest(step=1, artifact=artifact, manifest_sha256="00")
    failed = pb.AttemptFailed(error=tuning_job_pb2.JobError(reason="TRAINING_FAILED", message="not mine"))
    return [
        stub.FetchJobSecrets(pb.FetchJobSecretsRequest(**ids)),
        stub.StartAttempt(pb.StartAttemptRequest(**ids)),
        stub.ReportProgress(pb.ReportProgressRequest(**ids)),
        stub.CommitCheckpoint(pb.CommitCheckpointRequest(**ids, checkpoint=checkpoint)),
        stub.FinishAttempt(pb.FinishAttemptRequest(**ids, failed=failed)),
    ]
