"""Stale hands are refused: a report under an old token answers LEASE_STALE and changes no row of any table."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from chassis.errors import Aborted, FailedPrecondition
from services.scheduler.jobs.endings import Ending, JobFailure
from services.scheduler.jobs.job import LeaseRef
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.placement.store import AllocationStore
from tests.store.scheduler.world import LIMITS, World, checkpoint, metric, model, train

FAILURE = JobFailure(reason="TRAINING_FAILED", message="the node's disk broke", platform_fault=True)
USER_FAILURE = JobFailure(reason="TRAINING_INPUT_INVALID", message="loss is not a number", platform_fault=False)

Report = Callable[[World, LeaseRef], Awaitable[object]]
REPORTS: dict[str, Report] = {
    "start": lambda world, lease: world.reports.start(lease),
    "progress": lambda world, lease: world.reports.report(lease, [metric(9)], [train(0, 9)], ["late"]),
    "checkpoint": lambda world, lease: world.reports.commit(lease, checkpoint(9)),
    "succeed": lambda world, lease: world.attempts.succeed(lease, model()),
    "fail": lambda world, lease: world.attempts.fail(lease, USER_FAILURE, retryable=False),
    "retry": lambda world, lease: world.attempts.fail(lease, FAILURE, retryable=True),
    "stop": lambda world, lease: world.attempts.stop(lease, 9),
}


@pytest.mark.parametrize("name", REPORTS)
async def test_an_old_token_changes_nothing(world: World, name: str) -> None:
    await world.add_node()
    old = await world.running_job()
    assert await world.lose(old)
    new = await world.place_again(old)
    assert new.lease_token > old.lease_token
    before = await world.everything()
    with pytest.raises(Aborted) as refused:
        await REPORTS[name](world, old)
    assert refused.value.reason == "LEASE_STALE"
    assert await world.everything() == before


@pytest.mark.parametrize("name", REPORTS)
async def test_a_token_of_another_project_changes_nothing(world: World, name: str) -> None:
    await world.add_node()
    lease = await world.running_job()
    before = await world.everything()
    with pytest.raises(Aborted):
        await REPORTS[name](world, LeaseRef(project_id="proj_b", job_id=lease.job_id, lease_token=lease.lease_token))
    assert await world.everything() == before


async def test_an_old_token_is_not_renewed(world: World) -> None:
    await world.add_node()
    old = await world.running_job()
    await world.lose(old)
    new = await world.place_again(old)
    async with world.database.writing() as connection:
        tokens = [old.lease_token, new.lease_token]
        assert await AllocationStore(connection).renew_leases("n1", "i1", tokens, **LIMITS) == {new.lease_token}
        assert await AllocationStore(connection).renew_leases("n1", "other", tokens, **LIMITS) == set()


@pytest.mark.parametrize("name", ["progress", "checkpoint", "succeed"])
async def test_nothing_is_reported_before_the_start(world: World, name: str) -> None:
    await world.add_node()
    lease = await world.placed_job()
    before = await world.everything()
    with pytest.raises(FailedPrecondition) as refused:
        await REPORTS[name](world, lease)
    assert refused.value.reason == "STATE_CONFLICT"
    assert await world.everything() == before


@pytest.mark.parametrize("name", ["succeed", "fail", "retry"])
async def test_an_ending_that_is_told_again_is_no_error(world: World, name: str) -> None:
    await world.add_node()
    lease = await world.running_job()
    await REPORTS[name](world, lease)
    before = await world.everything()
    await REPORTS[name](world, lease)
    assert await world.everything() == before


async def test_another_ending_after_the_first_is_stale(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    await world.attempts.succeed(lease, model())
    with pytest.raises(Aborted):
        await world.attempts.fail(lease, FAILURE, retryable=True)
    assert (await world.job(lease)).state is JobState.SUCCEEDED


async def test_a_start_that_is_told_again_is_no_error(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    before = await world.everything()
    await world.reports.start(lease)
    assert await world.everything() == before


async def test_success_ends_once_with_the_model_and_the_count_of_usage(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    await world.reports.report(lease, [metric(5)], [train(0, 5), train(5, 10)], [])
    await world.attempts.succeed(lease, model("rv_9"))
    (ended,) = await world.events("tuning.job.ended", lease)
    assert ended.usage_record_count == 2
    assert ended.model.revision == "rv_9"
    assert ended.model.model_id == (await world.job(lease)).output_model
    assert ended.model.artifact.key == "models/x/"


async def test_the_users_failure_and_ours_end_differently(world: World) -> None:
    await world.add_node(devices=2)
    theirs, ours = await world.running_job(), await world.running_job()
    await world.attempts.fail(theirs, USER_FAILURE, retryable=False)
    await world.attempts.fail(ours, FAILURE, retryable=False)
    endings = [(await world.events("tuning.job.ended", lease))[0].ending for lease in (theirs, ours)]
    names = [type_name(ending) for ending in endings]
    assert names == [Ending.USER_FAILURE, Ending.PLATFORM_FAILURE]


def type_name(ending: Any) -> str:
    from finemesh.events.v1 import tuning_events_pb2

    return tuning_events_pb2.TuningJobEnding.Name(ending).removeprefix("TUNING_JOB_ENDING_")
