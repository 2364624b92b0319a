"""kill -9 of each process in the middle of a job: the job still completes, with the same bytes, and is charged once.

Slow (a training process starts anew per test), because only real processes die as processes die.
"""

from __future__ import annotations

import signal
from datetime import UTC, datetime

import pytest

from finemesh.tuning.v1 import tuning_job_event_pb2 as events
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from tests.faults.conftest import (
    Undisturbed,
    assert_like_undisturbed,
    assert_resumed_once,
    create_and_wait_for_its_middle,
)
from tests.harness.mesh import Mesh

SERVICES = ["scheduler", "billing", "inference", "gateway", "nats", "postgres"]


async def test_kill_the_training_child(mesh: Mesh, undisturbed: Undisturbed) -> None:
    job = await create_and_wait_for_its_middle(mesh, "killed-child")
    (child,) = mesh.training_children().values()
    child.send_signal(signal.SIGKILL)
    ended = await assert_like_undisturbed(mesh, job.name, undisturbed)
    await assert_resumed_once(mesh, ended)


async def test_kill_the_agent_and_with_it_the_child(mesh: Mesh, undisturbed: Undisturbed) -> None:
    job = await create_and_wait_for_its_middle(mesh, "killed-agent")
    ((agent, child),) = mesh.training_children().items()
    await mesh.stack.kill(agent)
    child.wait(timeout=20)
    ended = await assert_like_undisturbed(mesh, job.name, undisturbed)
    await assert_resumed_once(mesh, ended)
    await mesh.stack.wait_healthy()


@pytest.mark.parametrize("victim", SERVICES)
async def test_kill_a_service(mesh: Mesh, undisturbed: Undisturbed, victim: str) -> None:
    job = await create_and_wait_for_its_middle(mesh, f"killed-{victim}")
    restarts = mesh.stack.restarts(victim)
    await mesh.stack.kill(victim)
    killed_at = datetime.now(UTC)
    await mesh.stack.wait_healthy(victim)
    ended = await assert_like_undisturbed(mesh, job.name, undisturbed)
    assert mesh.stack.restarts(victim) == restarts + 1
    assert ended.attempt_count == 1, "the training went on meanwhile"
    assert await steps_after(mesh, ended, killed_at)
    await mesh.stack.wait_healthy()


async def steps_after(mesh: Mesh, job: pb.TuningJob, moment: datetime) -> list[int]:
    """Steps that were recorded after a moment: none means that the job was over by then."""
    return [
        event.progress.step
        async for event in mesh.client.jobs.events(job.name)
        if event.kind == events.TUNING_JOB_EVENT_KIND_METRICS and event.event_time.ToDatetime(UTC) > moment
    ]
