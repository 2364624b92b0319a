"""A job's history has no gaps and no doubles, however many write at once; guards hold under races."""

import asyncio
from uuid import UUID

import asyncpg
import pytest

from services.scheduler.jobs.job import JobRef
from services.scheduler.jobs.lifecycle import TABLE, Guard, JobState, JobTransition
from services.scheduler.jobs.store import Changes, JobStore
from tests.store.scheduler.world import PROJECT, World, metric, train


async def sequences(world: World, ref: JobRef) -> list[int]:
    return [event.sequence for event in await JobStore(world.pool).list_events(ref, 0, 10_000)]


async def test_numbers_have_no_gaps_under_concurrency(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    reports = [
        world.reports.report(lease, [metric(step), metric(step, validation_loss=step / 100)], [], [f"warning {step}"])
        for step in range(1, 21)
    ]
    await asyncio.gather(*reports)
    found = await sequences(world, lease)
    assert found == list(range(1, len(found) + 1))
    assert len(found) == 4 + 60


async def test_a_rolled_back_report_leaves_no_gap(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    with pytest.raises(asyncpg.PostgresError):
        await world.reports.report(lease, [metric(1)], [train(0, 1, tokens=-1)], [])
    await world.reports.report(lease, [metric(1)], [], [])
    assert await sequences(world, lease) == [1, 2, 3, 4, 5]


GUARDS: dict[Guard, Changes] = {Guard.STATE: {}, Guard.CLAIM: {"claim": UUID(int=7)}, Guard.LEASE: {"lease_token": 7}}
OTHERS: dict[Guard, Changes] = {Guard.CLAIM: {"claim": UUID(int=8)}, Guard.LEASE: {"lease_token": 8}}


async def stand(world: World, state: JobState) -> JobRef:
    """A job in this state, under the claim and the lease that GUARDS names."""
    ref = await world.new_job()
    await world.pool.execute(
        "UPDATE jobs SET state = $1, claim_token = $2, lease_token = 7 WHERE job_id = $3",
        state.value,
        GUARDS[Guard.CLAIM]["claim"],
        ref.job_id,
    )
    return ref


@pytest.mark.parametrize("transition", list(JobTransition))
@pytest.mark.parametrize("state", list(JobState))
async def test_the_guard_in_sql_is_the_table(world: World, transition: JobTransition, state: JobState) -> None:
    ref = await stand(world, state)
    async with world.database.writing() as connection:
        change = await world.jobs.transition(
            connection, transition, ref, "asked for", **GUARDS[TABLE[transition].guard]
        )
    allowed = state in TABLE[transition].sources
    assert (change is not None) == allowed
    assert (await world.job(ref)).state is (TABLE[transition].destination if allowed else state)
    if change is not None:
        assert change.from_state is state
        events = await world.events("tuning.job.state_changed", ref)
        assert (events[-1].from_state, events[-1].to_state) == (state.value, change.to_state.value)


@pytest.mark.parametrize("transition", [each for each in JobTransition if TABLE[each].guard in OTHERS])
async def test_a_guard_that_is_not_in_force_changes_nothing(world: World, transition: JobTransition) -> None:
    rule = TABLE[transition]
    ref = await stand(world, min(rule.sources))
    before = await world.everything()
    async with world.database.writing() as connection:
        assert await world.jobs.transition(connection, transition, ref, "asked for", **OTHERS[rule.guard]) is None
        with pytest.raises(ValueError, match="is guarded by"):
            await world.jobs.transition(connection, transition, ref, "asked for")
    assert await world.everything() == before


async def test_of_many_cancellations_one_wins(world: World) -> None:
    ref = await world.new_job()

    async def cancel() -> bool:
        async with world.database.writing() as connection:
            change = await world.jobs.transition(connection, JobTransition.CANCEL_WAITING, ref, "cancelled")
        return change is not None

    assert sum(await asyncio.gather(*(cancel() for _ in range(8)))) == 1
    assert await sequences(world, ref) == [1, 2]


async def test_a_foreign_project_sees_and_changes_nothing(world: World) -> None:
    ref = await world.new_job()
    foreign = JobRef(project_id="proj_b", job_id=ref.job_id)
    assert await JobStore(world.pool).get(foreign) is None
    assert await JobStore(world.pool).list_events(foreign, 0, 10) == []
    async with world.database.writing() as connection:
        assert await world.jobs.transition(connection, JobTransition.CANCEL_WAITING, foreign, "x") is None
    assert await JobStore(world.pool).list_jobs("proj_b", "", 10) == []


async def test_a_name_is_free_again_when_its_job_failed(world: World) -> None:
    first = await world.new_job(output_name="mine")
    with pytest.raises(asyncpg.UniqueViolationError, match="jobs_one_per_output_name"):
        await world.new_job(output_name="mine")
    await world.new_job(output_name="mine", project="proj_b")
    await world.pool.execute("UPDATE jobs SET state = 'CANCELLED' WHERE job_id = $1", first.job_id)
    await world.new_job(output_name="mine")


async def test_jobs_are_listed_newest_first_in_pages(world: World) -> None:
    refs = [await world.new_job() for _ in range(5)]
    first = await JobStore(world.pool).list_jobs(PROJECT, "", 3)
    rest = await JobStore(world.pool).list_jobs(PROJECT, first[-1].job_id, 3)
    assert [job.job_id for job in [*first, *rest]] == [ref.job_id for ref in reversed(refs)]
