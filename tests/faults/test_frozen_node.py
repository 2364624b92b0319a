"""A node that freezes and comes back: its job has moved on by then, and nothing that the node says counts any more."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable
from typing import Any

import asyncpg
import psutil
import pytest

from chassis.errors import Aborted
from chassis.rpc.channel import open_channel
from chassis.settings import ChassisSettings
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from tests.faults.conftest import (
    Undisturbed,
    assert_like_undisturbed,
    assert_resumed_once,
    create_and_wait_for_its_middle,
)
from tests.harness.mesh import JOB_TIMEOUT_S, Mesh

ATTEMPTS = "SELECT lease_token, node, outcome FROM attempts WHERE job_id = $1 ORDER BY attempt"


async def test_a_frozen_node_loses_its_job_and_is_refused_when_it_wakes(mesh: Mesh, undisturbed: Undisturbed) -> None:
    job = await create_and_wait_for_its_middle(mesh, "frozen-node")
    job_id = job.name.rpartition("/")[2]
    ((agent, child),) = mesh.training_children().items()
    child.suspend()
    await mesh.stack.kill(agent, signal.SIGSTOP)
    try:
        await until_second_attempt_has_a_checkpoint(mesh, job.name)
        (first, second) = await mesh.rows("scheduler", ATTEMPTS, job_id)
        assert first["node"] != second["node"]
        assert (first["outcome"], second["outcome"]) == ("LOST", None)
        assert (await mesh.client.jobs.get(job.name)).state == pb.TUNING_JOB_STATE_RUNNING
    finally:
        child.resume()
        await mesh.stack.kill(agent, signal.SIGCONT)
    await assert_refused(mesh, job.name, first)
    await asyncio.to_thread(psutil.wait_procs, [child], 60)
    assert not child.is_running()
    ended = await assert_like_undisturbed(mesh, job.name, undisturbed)
    await assert_resumed_once(mesh, ended)
    outcomes = [row["outcome"] for row in await mesh.rows("scheduler", ATTEMPTS, job_id)]
    assert outcomes == ["LOST", "SUCCEEDED"]
    await assert_refused(mesh, job.name, first)
    assert await mesh.client.jobs.get(job.name) == ended


async def until_second_attempt_has_a_checkpoint(mesh: Mesh, name: str) -> None:
    async with asyncio.timeout(JOB_TIMEOUT_S):
        async for _ in mesh.client.jobs.watch(name):
            if [c async for c in mesh.client.jobs.checkpoints(name) if c.attempt == 2]:
                return
    raise AssertionError(f"{name} ended before its second attempt had a checkpoint")


async def assert_refused(mesh: Mesh, name: str, stale: asyncpg.Record) -> None:
    """Whatever the old holder of the lease may still report, by the wire and with its node's certificate."""
    stale_token = stale["lease_token"]
    settings = ChassisSettings(service_name="trainer", tls_dir=mesh.stack.folder.tls / f"trainer@{stale['node']}")
    channel = open_channel(settings, mesh.stack.addresses["scheduler.AGENTS"], "scheduler")
    stub = node_service_pb2_grpc.NodeServiceStub(channel)
    ids: dict[str, Any] = {"tuning_job": name, "lease_token": stale_token}
    project, job_id = name.split("/")[1], name.split("/")[3]
    artifact = artifact_pb2.Artifact(
        key=f"jobs/{project}/{job_id}/checkpoints/99-{stale_token}/",
        files=[artifact_pb2.ArtifactFile(path="state.json", size_bytes=1, sha256="0" * 64)],
    )
    metrics = [pb.TuningProgress(step=99, step_count=120)]
    usage = [node_service_pb2.TrainingUsage(kind="train", start_step=98, end_step=99, tokens=10**9)]
    checkpoint = node_pb2.CheckpointManifest(step=99, artifact=artifact, manifest_sha256="0" * 64)
    failed = node_service_pb2.AttemptFailed(error=pb.JobError(reason="TRAINING_FAILED", message="stale"))
    stopped = node_service_pb2.AttemptStopped(step=99)
    calls: list[Awaitable[object]] = [
        stub.StartAttempt(node_service_pb2.StartAttemptRequest(**ids)),
        stub.ReportProgress(node_service_pb2.ReportProgressRequest(**ids, metrics=metrics, usage=usage)),
        stub.CommitCheckpoint(node_service_pb2.CommitCheckpointRequest(**ids, checkpoint=checkpoint)),
        stub.FinishAttempt(node_service_pb2.FinishAttemptRequest(**ids, failed=failed)),
        stub.FinishAttempt(node_service_pb2.FinishAttemptRequest(**ids, stopped=stopped)),
    ]
    try:
        for call in calls:
            with pytest.raises(Aborted) as refused:
                await call
            assert refused.value.reason == "LEASE_STALE"
    finally:
        await channel.close()
