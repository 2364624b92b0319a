"""Metric lines leave some time after a job's end, in bounded batches; the rest of its history stays."""

from services.scheduler.jobs.job import EventKind, JobRef
from services.scheduler.jobs.lifecycle import JobState, JobTransition
from services.scheduler.pipelines.history_keeper import HistoryKeeper
from tests.store.scheduler.world import World

KINDS = "SELECT kind FROM job_events WHERE job_id = $1 ORDER BY sequence"
DAY_S = 86_400.0


async def add_lines(world: World, ref: JobRef) -> None:
    metrics = [(EventKind.METRICS, f"step {step}", None) for step in range(7)]
    async with world.database.writing() as connection:
        await world.jobs.add_lines(connection, ref, JobState.QUEUED, [*metrics, (EventKind.WARNING, "a warning", None)])


async def test_metric_lines_of_jobs_that_ended_long_ago_are_deleted(world: World) -> None:
    ended, unfinished = await world.new_job(), await world.new_job()
    for ref in (ended, unfinished):
        await add_lines(world, ref)
    async with world.database.writing() as connection:
        assert await world.jobs.transition(connection, JobTransition.CANCEL_WAITING, ended, "cancelled") is not None
    settings = world.settings.model_copy(update={"metric_retention_s": 10 * DAY_S, "history_batch_max": 3})
    keeper = HistoryKeeper(world.database, world.clock, settings)
    world.clock.jump(9 * DAY_S)
    assert not await keeper.prune_one()
    world.clock.jump(2 * DAY_S)
    assert [await keeper.prune_one() for _ in range(4)] == [True, True, True, False]
    kinds = [row["kind"] for row in await world.pool.fetch(KINDS, ended.job_id)]
    assert kinds == ["STATE_CHANGED", "WARNING", "STATE_CHANGED"]
    assert len(await world.pool.fetch(KINDS, unfinished.job_id)) == 9
