"""One mesh of two nodes and one undisturbed job for all fault tests: what a disturbed job must equal.

The engine is the stub, slowed down and with a single slot, so that a test meets an answer in its middle.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import pytest
import pytest_asyncio

from finemesh.billing.v1 import usage_record_pb2
from finemesh.tuning.v1 import tuning_job_event_pb2 as events
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from tests.harness.mesh import Mesh, running_mesh

# 120 steps and 24 checkpoints: a kill after the second one is far from the end.
EPOCHS = 12
CHECKPOINT_INTERVAL_STEPS = 5
TOKEN_S = 0.1


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(
        tmp_path_factory.mktemp("faults"),
        nodes=2,
        FINEMESH_INFERENCE_STUB_TOKEN_S=str(TOKEN_S),
        FINEMESH_INFERENCE_SEQUENCES_MAX="1",
        # A test waits twice until every reader has all events.
        FINEMESH_BILLING_ARCHIVE_INTERVAL_S="0.5",
    ) as running:
        yield running


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """What a job of the same spec gives when nobody disturbs it; usage is tokens by work key without the job's id."""

    adapter_sha256: str
    charged_nanos_usd: int
    usage: Mapping[str, int]


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def undisturbed(mesh: Mesh) -> Undisturbed:
    job = await mesh.ended((await mesh.client.jobs.create(spec(mesh, "undisturbed"))).name)
    assert job.state == pb.TUNING_JOB_STATE_SUCCEEDED, job.error.message
    assert job.attempt_count == 1
    charge = await mesh.settled(job.name)
    return Undisturbed(
        adapter_sha256=await mesh.adapter_sha256(job.output_model),
        charged_nanos_usd=charge.charged_nanos_usd,  # type: ignore[attr-defined]
        usage=tokens_by_work(await usage_of(mesh, job.name)),
    )


def spec(mesh: Mesh, output_name: str) -> pb.TuningSpec:
    return mesh.spec(output_name, epochs=EPOCHS, checkpoint_interval_steps=CHECKPOINT_INTERVAL_STEPS)


async def create_and_wait_for_its_middle(mesh: Mesh, output_name: str) -> pb.TuningJob:
    """A job that trains, has two checkpoints, and is far from its end."""
    created = await mesh.client.jobs.create(spec(mesh, output_name))
    await mesh.until_checkpoint(created.name)
    job = await mesh.client.jobs.get(created.name)
    assert job.state == pb.TUNING_JOB_STATE_RUNNING
    assert 2 * CHECKPOINT_INTERVAL_STEPS <= job.progress.step < job.progress.step_count
    return job


async def usage_of(mesh: Mesh, resource: str) -> list[usage_record_pb2.UsageRecord]:
    return [record async for record in mesh.client.billing.usage(resource)]


def tokens_by_work(usage: list[usage_record_pb2.UsageRecord]) -> dict[str, int]:
    """Each piece of work once, or it was metered twice."""
    found = {record.work_key.partition(":")[2]: record.quantity for record in usage}
    assert len(found) == len(usage)
    return found


async def assert_like_undisturbed(mesh: Mesh, name: str, undisturbed: Undisturbed) -> pb.TuningJob:
    """Same bytes, one charge equal to quote and hold, and the same usage records, each once."""
    job = await mesh.ended(name)
    assert job.state == pb.TUNING_JOB_STATE_SUCCEEDED, job.error.message
    assert await mesh.adapter_sha256(job.output_model) == undisturbed.adapter_sha256
    charge = await mesh.settled(name)
    assert charge.charged_nanos_usd == charge.held_nanos_usd == charge.quoted_nanos_usd  # type: ignore[attr-defined]
    assert charge.charged_nanos_usd == undisturbed.charged_nanos_usd  # type: ignore[attr-defined]
    assert charge.released_nanos_usd == 0  # type: ignore[attr-defined]
    assert tokens_by_work(await usage_of(mesh, name)) == undisturbed.usage
    await assert_ledger_agrees(mesh)
    return job


async def assert_ledger_agrees(mesh: Mesh) -> None:
    """Everything that billing holds follows from everything else, over all organizations."""
    (outcome,) = [answer async for answer in mesh.client.ledger.verify("organizations/-") if answer.done]
    assert not outcome.HasField("difference"), outcome.difference


async def assert_resumed_once(mesh: Mesh, job: pb.TuningJob) -> None:
    """The job was requeued once, and its second attempt went on from a checkpoint instead of from the beginning."""
    assert job.attempt_count == 2
    history = [event async for event in mesh.client.jobs.events(job.name)]
    (cut,) = [i for i, event in enumerate(history) if event.kind == events.TUNING_JOB_EVENT_KIND_REQUEUED]
    before, after = _metrics(history[:cut]), _metrics(history[cut:])
    resumed_from = after[0] - 1
    assert 2 * CHECKPOINT_INTERVAL_STEPS <= resumed_from <= before[-1]
    assert resumed_from % CHECKPOINT_INTERVAL_STEPS == 0
    assert after == list(range(resumed_from + 1, job.progress.step_count + 1))


def _metrics(history: list[events.TuningJobEvent]) -> list[int]:
    return [event.progress.step for event in history if event.kind == events.TUNING_JOB_EVENT_KIND_METRICS]
