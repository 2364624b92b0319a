"""kill -9 of each process in the middle of a job: the job still completes, with the same bytes, and is charged once.

Slow (a training process starts anew per test), because only real processes die as processes die.
"""

from __future__ import annotations

import signal

import pytest

from finemesh.tuning.v1 import tuning_job_pb2 as pb
from tests.faults.conftest import Undisturbed
from tests.harness.mesh import Mesh


async def assert_like_undisturbed(mesh: Mesh, name: str, undisturbed: Undisturbed) -> pb.TuningJob:
    """Same bytes, one charge equal to quote and hold, and the same usage records, each once."""
    job = await mesh.ended(name)
    assert job.state == pb.TUNING_JOB_STATE_SUCCEEDED, job.error.message
    assert await mesh.adapter_sha256(job.output_model) == undisturbed.adapter_sha256
    charge = await mesh.settled(name)
    assert charge.charged_nanos_usd == charge.held_nanos_usd == charge.quoted_nanos_usd  # type: ignore[attr-defined]
    assert charge.charged_nanos_usd == undisturbed.charged_nanos_usd  # type: ignore[attr-defined]
    usage = [record async for record in mesh.client.billing.usage(name)]
    assert len(usage) == len({record.work_key for record in usage})
    assert {record.work_key.partition(":")[2] for record in usage} == undisturbed.usage_keys
    return job


async def test_kill_the_training_child(mesh: Mesh, undisturbed: Undisturbed) -> None:
    job = await mesh.client.jobs.create(mesh.spec("killed-child"))
    await mesh.until_checkpoint(job.name)
    (child,) = mesh.training_children()
    child.send_signal(signal.SIGKILL)
    ended = await assert_like_undisturbed(mesh, job.name, undisturbed)
    assert ended.attempt_count == 2


async def test_kill_the_agent_and_with_it_the_child(mesh: Mesh, undisturbed: Undisturbed) -> None:
    job = await mesh.client.jobs.create(mesh.spec("killed-agent"))
    await mesh.until_checkpoint(job.name)
    (child,) = mesh.training_children()
    await mesh.stack.kill("trainer-0")
    child.wait(timeout=20)
    ended = await assert_like_undisturbed(mesh, job.name, undisturbed)
    assert ended.attempt_count == 2


@pytest.mark.parametrize("victim", ["scheduler", "billing", "inference", "gateway", "nats", "postgres"])
async def test_kill_a_service(mesh: Mesh, undisturbed: Undisturbed, victim: str) -> None:
    job = await mesh.client.jobs.create(mesh.spec(f"killed-{victim}"))
    await mesh.until_checkpoint(job.name)
    await mesh.stack.kill(victim)
    await mesh.stack.wait_healthy(victim)
    await assert_like_undisturbed(mesh, job.name, undisturbed)
    await mesh.stack.wait_healthy()
