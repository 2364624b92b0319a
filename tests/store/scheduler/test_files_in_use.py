"""Which files jobs still read: as long as any job that names one has not ended."""

from services.scheduler.jobs.job import JobRef
from services.scheduler.jobs.lifecycle import JobTransition
from services.scheduler.jobs.store import JobStore
from tests.store.scheduler.world import World, artifact

TRAINING, VALIDATION, OTHER = "files/proj_a/file-1", "files/proj_a/file-2", "files/proj_a/file-3"


async def in_use(world: World) -> set[str]:
    asked = [TRAINING, VALIDATION, OTHER, "files/proj_b/file-1", "nonsense"]
    return set(await JobStore(world.pool).files_in_use(asked))


async def end(world: World, ref: JobRef) -> None:
    async with world.database.writing() as connection:
        assert await world.jobs.transition(connection, JobTransition.CANCEL_WAITING, ref, "cancelled") is not None


async def test_a_file_is_in_use_until_the_last_job_that_reads_it_has_ended(world: World) -> None:
    assert await in_use(world) == set()
    training, validation = artifact(TRAINING), artifact(VALIDATION)
    new = await world.new_job(training_artifact=training, validation_artifact=validation)
    queued = await world.queued_job(training_artifact=training)
    assert await in_use(world) == {TRAINING, VALIDATION}
    await end(world, new)
    assert await in_use(world) == {TRAINING}
    await end(world, queued)
    assert await in_use(world) == set()
