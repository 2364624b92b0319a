"""A checkpoint that a node cannot use is marked, with its reason, and the job goes on from the one before."""

from typing import Any

from services.scheduler.attempts.attempt import BadCheckpoint
from services.scheduler.jobs.endings import JobFailure
from services.scheduler.jobs.job import EventKind, LeaseRef
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.jobs.store import JobStore
from services.scheduler.nodes.store import NodeStore
from tests.store.scheduler.world import World, checkpoint

TORN = JobFailure(reason="DATA_CORRUPT", message="optimizer.safetensors is missing", platform_fault=True)


async def resume_step(world: World, lease: LeaseRef) -> int | None:
    (record,) = await NodeStore(world.pool).list_assignments("n1", "i1")
    assert record.lease_token == lease.lease_token
    return record.resume_step


async def report_torn(world: World, lease: LeaseRef, step: int) -> LeaseRef:
    """The attempt fails of the checkpoint of this step; the next attempt's lease."""
    bad = BadCheckpoint(step=step, manifest_sha256=f"sha-{step}")
    await world.attempts.fail(lease, TORN, retryable=True, bad_checkpoint=bad)
    assert (await world.job(lease)).state is JobState.QUEUED
    return await world.place_again(lease)


async def with_checkpoints(world: World, *steps: int) -> LeaseRef:
    await world.add_node()
    lease = await world.running_job()
    for step in steps:
        await world.reports.commit(lease, checkpoint(step, lease.lease_token))
    await world.lose(lease)
    return await world.place_again(lease)


async def warnings(world: World, lease: LeaseRef) -> list[str]:
    events = await JobStore(world.pool).list_events(lease, 0, 100)
    return [event.message for event in events if event.kind is EventKind.WARNING]


async def test_the_checkpoint_before_a_torn_one_is_used(world: World) -> None:
    lease = await with_checkpoints(world, 10, 20)
    failures = (await world.job(lease)).failure_count
    lease = await report_torn(world, lease, 20)
    assert await resume_step(world, lease) == 10
    (warning,) = await warnings(world, lease)
    assert warning == (
        "the checkpoint after step 20 cannot be used: optimizer.safetensors is missing; "
        "the job goes on from the one after step 10"
    )
    assert (await world.job(lease)).failure_count == failures
    assert [each.step for each in await JobStore(world.pool).list_checkpoints(lease, -1, 10)] == [10]


async def test_without_a_whole_checkpoint_the_job_starts_anew(world: World) -> None:
    lease = await with_checkpoints(world, 10, 20)
    lease = await report_torn(world, await report_torn(world, lease, 20), 10)
    assert await resume_step(world, lease) is None
    assert (await warnings(world, lease))[-1].endswith("the job starts anew")


async def test_the_same_step_is_committed_again_in_place_of_the_torn_one(world: World) -> None:
    lease = await with_checkpoints(world, 10, 20)
    torn = await world.pool.fetchval("SELECT artifact FROM checkpoints WHERE step = 20")
    lease = await report_torn(world, lease, 20)
    again = checkpoint(20, lease.lease_token)
    # The files of the torn one are given up; those of the new one are not.
    assert await world.reports.commit(lease, again) == [torn]
    await world.reports.commit(lease, again)
    (_, kept) = await JobStore(world.pool).list_checkpoints(lease, -1, 10)
    assert (kept.step, kept.artifact, kept.attempt) == (20, again.artifact, 3)


async def test_a_step_whose_checkpoints_are_torn_again_and_again_ends_the_job(world: World) -> None:
    lease = await with_checkpoints(world, 10, 20)
    bad = BadCheckpoint(step=20, manifest_sha256="sha-20")
    for _ in range(world.settings.attempts_max + 2):
        await world.attempts.fail(lease, TORN, retryable=True, bad_checkpoint=bad)
        if (await world.job(lease)).state is not JobState.QUEUED:
            break
        lease = await world.place_again(lease)
        await world.reports.commit(lease, checkpoint(20, lease.lease_token))
    assert (await world.job(lease)).state is JobState.FAILED


async def test_only_the_checkpoint_that_is_resumed_from_can_be_marked(world: World) -> None:
    lease = await with_checkpoints(world, 10, 20)
    wrong: list[Any] = [
        BadCheckpoint(step=20, manifest_sha256="another"),
        BadCheckpoint(step=10, manifest_sha256="sha-10"),
    ]
    for bad in wrong:
        await world.attempts.fail(lease, TORN, retryable=True, bad_checkpoint=bad)
        lease = await world.place_again(lease)
        assert await resume_step(world, lease) == 20
    assert await warnings(world, lease) == []
