"""After an attempt is lost: back to the queue, on from the last committed checkpoint, metered once,
given up at a limit."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.attempts.attempt import Usage
from services.scheduler.jobs.endings import JobFailure
from services.scheduler.jobs.job import EventKind, LeaseRef
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.jobs.store import JobStore
from services.scheduler.nodes.store import NodeStore
from services.scheduler.placement.store import AllocationStore
from tests.store.scheduler.test_fencing import FAILURE, type_name
from tests.store.scheduler.world import World, checkpoint, metric, model, train


async def assignment(world: World, lease: LeaseRef) -> Any:
    (record,) = await NodeStore(world.pool).list_assignments("n1", "i1")
    assert record.lease_token == lease.lease_token
    return record


async def test_the_next_attempt_goes_on_from_the_last_committed_checkpoint(world: World) -> None:
    await world.add_node()
    first = await world.running_job()
    await world.reports.commit(first, checkpoint(10))
    await world.reports.commit(first, checkpoint(20))
    await world.reports.report(first, [metric(25)], [train(20, 25)], [])
    await world.lose(first)
    assert (await world.job(first)).state is JobState.QUEUED
    assert await NodeStore(world.pool).list_assignments("n1", "i1") == []
    second = await world.place_again(first)
    record = await assignment(world, second)
    assert record.resume_step == 20
    assert record.attempt == 2


async def test_an_uncommitted_checkpoint_is_not_resumed_from(world: World) -> None:
    await world.add_node()
    first = await world.running_job()
    await world.lose(first)
    second = await world.place_again(first)
    assert (await assignment(world, second)).resume_step is None


async def test_redone_work_is_metered_once_and_the_first_count_stays(world: World) -> None:
    await world.add_node()
    first = await world.running_job()
    evaluation = Usage(kind="evaluate", start_step=1, end_step=1, tokens=7)
    await world.reports.report(first, [metric(10)], [train(0, 10, 100), evaluation], [])
    await world.reports.report(first, [metric(10)], [train(0, 10, 100), evaluation], [])
    await world.lose(first)
    second = await world.place_again(first)
    with capture_logs() as logs:
        await world.reports.report(second, [metric(10)], [train(0, 10, 101), evaluation, train(10, 20, 50)], [])
    rows = await world.pool.fetch("SELECT work_key, tokens FROM job_usage ORDER BY recorded_at, work_key")
    assert {row["work_key"]: row["tokens"] for row in rows} == {
        f"{first.job_id}:train:0-10": 100,
        f"{first.job_id}:evaluate:1": 7,
        f"{first.job_id}:train:10-20": 50,
    }
    events = await world.events("usage.training.recorded", first)
    assert sorted(event.work_key for event in events) == sorted(row["work_key"] for row in rows)
    assert any("first_count_stays" in entry["event"] for entry in logs)


async def test_steps_are_never_metered_in_two_ranges(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    with capture_logs() as logs:
        await world.reports.report(lease, [], [train(0, 10), train(5, 15), train(9, 10), train(10, 20)], [])
    rows = await world.pool.fetch("SELECT work_key FROM job_usage")
    assert {row["work_key"].split(":")[-1] for row in rows} == {"0-10", "10-20"}
    assert sum("overlaps" in entry["event"] for entry in logs) == 2


async def test_a_repeated_report_adds_no_event(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    report = [metric(1), metric(2), metric(2, validation_loss=1.5)]
    await world.reports.report(lease, report, [], ["careful"])
    await world.reports.report(lease, report, [], ["careful"])
    await world.reports.report(lease, [*report, metric(3, validation_loss=1.5)], [], [])
    events = await JobStore(world.pool).list_events(lease, 4, 100)
    assert [event.kind for event in events] == [
        EventKind.WARNING,
        EventKind.METRICS,
        EventKind.METRICS,
        EventKind.EVALUATION,
        EventKind.METRICS,
    ]
    progress = tuning_job_pb2.TuningProgress.FromString((await world.job(lease)).progress or b"")
    assert (progress.step, progress.validation_loss) == (3, 1.5)


async def test_failures_in_a_row_end_the_job_and_cost_nothing(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    for _ in range(world.settings.attempts_max - 1):
        await world.attempts.fail(lease, FAILURE, retryable=True)
        assert (await world.job(lease)).state is JobState.QUEUED
        lease = await world.place_again(lease)
    await world.attempts.fail(lease, FAILURE, retryable=True)
    job = await world.job(lease)
    assert job.state is JobState.FAILED
    error = tuning_job_pb2.JobError.FromString(job.error or b"")
    assert error.platform_fault
    assert "10 failures in a row" in error.message
    (ended,) = await world.events("tuning.job.ended", lease)
    assert type_name(ended.ending) == "PLATFORM_FAILURE"


async def test_a_new_checkpoint_begins_the_count_anew(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    for attempt in range(world.settings.attempts_max + 2):
        await world.reports.commit(lease, checkpoint(10 * (attempt + 1), lease.lease_token))
        await world.attempts.fail(lease, FAILURE, retryable=True)
        lease = await world.place_again(lease)
    assert (await world.job(lease)).state is JobState.RUNNING


async def test_the_queue_waits_longer_with_each_failure(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    await world.attempts.fail(lease, FAILURE, retryable=True)
    # By the database's clock: the events of the same transaction have its time, or a moment later.
    waits = "SELECT wake_at - (SELECT max(created_at) FROM outbox) FROM jobs"
    assert timedelta(seconds=0) < await world.pool.fetchval(waits) <= timedelta(seconds=0.5)
    await world.pool.execute("UPDATE jobs SET wake_at = now() + interval '1 h'")
    assert not await world.placer.place_round()
    await world.pool.execute("UPDATE jobs SET wake_at = now()")
    assert await world.placer.place_round()


async def test_a_drained_node_is_nobodys_failure(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    drained = JobFailure(
        reason="TRAINING_FAILED", message="the node drains", platform_fault=True, metadata={"drained": "true"}
    )
    await world.attempts.fail(lease, drained, retryable=True)
    job = await world.job(lease)
    assert (job.state, job.failure_count) == (JobState.QUEUED, 0)
    assert await world.placer.place_round()


async def test_old_checkpoints_are_told_to_be_deleted_and_not_listed(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    for step in (10, 20, 30):
        assert await world.reports.commit(lease, checkpoint(step)) == []
    obsolete = await world.reports.commit(lease, checkpoint(40))
    assert obsolete == [checkpoint(10).artifact]
    assert await world.reports.commit(lease, checkpoint(40)) == obsolete
    assert [each.step for each in await JobStore(world.pool).list_checkpoints(lease, -1, 10)] == [20, 30, 40]


async def test_the_first_checkpoint_of_a_step_stays(world: World) -> None:
    await world.add_node()
    first = await world.running_job()
    await world.reports.commit(first, checkpoint(10, first.lease_token))
    await world.lose(first)
    second = await world.place_again(first)
    theirs = checkpoint(10, second.lease_token)
    assert await world.reports.commit(second, theirs) == [theirs.artifact]
    (kept,) = await JobStore(world.pool).list_checkpoints(first, -1, 10)
    assert kept.artifact == checkpoint(10, first.lease_token).artifact
    assert kept.attempt == 1


@pytest.mark.parametrize("ending", ["lose", "fail", "stop"])
async def test_a_cancelled_job_is_cancelled_however_its_attempt_ends(world: World, ending: str) -> None:
    await world.add_node()
    lease = await world.running_job()
    await world.pool.execute("UPDATE jobs SET state = 'CANCELLING' WHERE job_id = $1", lease.job_id)
    await world.reports.report(lease, [metric(3)], [train(0, 3)], [])
    match ending:
        case "lose":
            await world.lose(lease)
        case "fail":
            await world.attempts.fail(lease, FAILURE, retryable=True)
        case _:
            await world.attempts.stop(lease, 3)
    assert (await world.job(lease)).state is JobState.CANCELLED
    (ended,) = await world.events("tuning.job.ended", lease)
    assert type_name(ended.ending) == "CANCELLED_RUNNING"
    assert ended.usage_record_count == 1


async def test_a_cancellation_that_comes_too_late_ships_the_model(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    await world.pool.execute("UPDATE jobs SET state = 'CANCELLING' WHERE job_id = $1", lease.job_id)
    await world.attempts.succeed(lease, model())
    assert (await world.job(lease)).state is JobState.SUCCEEDED


async def test_a_lease_that_was_renewed_in_the_last_moment_stays(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    async with world.database.writing() as connection:
        at = await AllocationStore(connection).time()
        assert not await world.attempts.lose(connection, lease, "too early", at=at)
    assert (await world.job(lease)).state is JobState.RUNNING


async def test_a_full_disk_is_waited_out_for_hours(world: World) -> None:
    """It says nothing about the job, and ten attempts are over in minutes."""
    await world.add_node()
    lease = await world.running_job()
    full = replace(FAILURE, metadata={"cause": "disk_full"})
    for _ in range(world.settings.attempts_max + 2):
        await world.attempts.fail(lease, full, retryable=True)
        assert (await world.job(lease)).state is JobState.QUEUED
        lease = await world.place_again(lease)
    await world.pool.execute("UPDATE jobs SET failure_count = $1", world.settings.disk_full_attempts_max - 1)
    await world.attempts.fail(lease, full, retryable=True)
    assert (await world.job(lease)).state is JobState.FAILED


async def beat(world: World) -> None:
    """A heartbeat of every node for all that it has."""
    await world.pool.execute("UPDATE nodes SET seen_at = now()")
    await world.pool.execute("UPDATE allocations SET expires_at = now() + interval '10 s' WHERE released_at IS NULL")


async def sweep_for(world: World, seconds: int, *, silent: bool) -> None:
    for _ in range(seconds):
        world.clock.jump(1.0)
        if silent:
            # The database's clock is the real one; what it wrote ages instead.
            await world.pool.execute("UPDATE nodes SET seen_at = seen_at - interval '1 s'")
            await world.pool.execute("UPDATE allocations SET expires_at = expires_at - interval '1 s'")
        else:
            await beat(world)
        await world.sweeper.sweep()


async def test_a_silent_node_is_lost_with_its_leases(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    await sweep_for(world, 12, silent=False)
    assert (await world.job(lease)).state is JobState.RUNNING
    await sweep_for(world, 12, silent=True)
    assert await world.pool.fetchval("SELECT state FROM nodes") == "LOST"
    job = await world.job(lease)
    assert (job.state, job.attempt_count) == (JobState.QUEUED, 1)
    assert not await world.placer.place_round()
    states = await world.pool.fetch("SELECT headers FROM outbox WHERE subject = 'node.state_changed'")
    assert len(states) == 2


async def test_a_scheduler_that_was_away_punishes_nobody(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    await sweep_for(world, 12, silent=False)
    world.clock.jump(3600.0)
    await world.sweeper.sweep()
    assert (await world.job(lease)).state is JobState.RUNNING
    await sweep_for(world, 5, silent=False)
    assert (await world.job(lease)).state is JobState.RUNNING
