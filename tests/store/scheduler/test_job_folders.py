"""Which files of an ended job stay, who cleans its folder, and that no running job's folder is handed out."""

from datetime import timedelta

import pytest

from chassis.errors import NotFound
from finemesh.artifacts.v1 import artifact_pb2
from services.scheduler.admission import continuation
from services.scheduler.admission.store import AdmissionStore
from services.scheduler.folders.convert import folder_to_proto
from services.scheduler.folders.job_folders import ClaimedFolder, JobFolders
from services.scheduler.jobs.job import JobRef, LeaseRef
from services.scheduler.spec.origin import OriginName
from tests.store.scheduler.world import PROJECT, World, checkpoint, model

DAY = timedelta(days=1)


def folders_of(world: World, **settings: float) -> JobFolders:
    return JobFolders(world.database, world.ids, world.settings.model_copy(update=settings))


async def ended_job(world: World) -> LeaseRef:
    """Checkpoints after the steps 1 to 4 of which the first was given up, and a model."""
    lease = await world.running_job()
    for step in (1, 2, 3, 4):
        await world.reports.commit(lease, checkpoint(step, lease.lease_token))
    await world.attempts.succeed(lease, model())
    return lease


async def age(world: World, by: timedelta) -> None:
    await world.pool.execute("UPDATE job_folders SET ended_at = ended_at - $1::interval", by)


def steps(folder: ClaimedFolder) -> list[int]:
    keys = [artifact_pb2.Artifact.FromString(kept).key for kept in folder.kept.checkpoints]
    return [int(key.split("/")[1].split("-")[0]) for key in keys]


async def test_a_day_after_the_end_the_own_state_goes_and_after_a_month_the_checkpoints(world: World) -> None:
    await world.add_node()
    lease = await ended_job(world)
    folders = folders_of(world)
    assert await folders.claim("n1") == []
    await age(world, 2 * DAY)
    (folder,) = await folders.claim("n1")
    assert (folder.ref, steps(folder)) == (JobRef(project_id=PROJECT, job_id=lease.job_id), [2, 3, 4])
    message = folder_to_proto(folder)
    assert message.key_prefix == f"jobs/{PROJECT}/{lease.job_id}/"
    assert message.model.key == "models/x/"
    assert await folders.claim("n1") == []
    assert await folders.finish(folder.ref, "n1", folder.claim)
    assert await folders.claim("n1") == []
    await age(world, 30 * DAY)
    (folder,) = await folders.claim("n1")
    assert (steps(folder), folder.kept.model is not None) == ([], True)
    assert await folders.finish(folder.ref, "n1", folder.claim)
    assert await world.pool.fetchval("SELECT count(*) FROM job_folders") == 0


async def test_a_checkpoint_that_another_run_starts_from_stays(world: World) -> None:
    await world.add_node()
    lease = await ended_job(world)
    name = OriginName(project_id=PROJECT, job_id=lease.job_id, step=3)
    origin = await continuation.find_origin(world.pool, PROJECT, name)
    async with world.database.writing() as connection:
        await continuation.keep(connection, PROJECT, origin)
    folders = folders_of(world)
    await age(world, 2 * DAY)
    (folder,) = await folders.claim("n1")
    await folders.finish(folder.ref, "n1", folder.claim)
    await age(world, 30 * DAY)
    (folder,) = await folders.claim("n1")
    assert steps(folder) == [3]
    # Whoever comes later is told so before anything is held, and not by a run that fails.
    with pytest.raises(NotFound):
        await continuation.find_origin(world.pool, PROJECT, OriginName(project_id=PROJECT, job_id=lease.job_id, step=4))


async def test_a_job_that_shipped_its_last_checkpoint_keeps_it(world: World) -> None:
    await world.add_node()
    lease = await ended_job(world)
    await world.pool.execute("UPDATE jobs SET output_artifact = NULL")
    await world.pool.execute("UPDATE job_folders SET stage = 1")
    await age(world, 31 * DAY)
    (folder,) = await folders_of(world).claim("n1")
    assert steps(folder) == [4]
    assert await AdmissionStore(world.pool).get_kept_checkpoint(PROJECT, lease.job_id, -1) is not None


async def test_only_jobs_that_ended_and_ran_have_a_folder_to_clean(world: World) -> None:
    await world.add_node(devices=2)
    running = await world.running_job()
    await world.reports.commit(running, checkpoint(1, running.lease_token))
    waiting = await world.queued_job(gpu_count=2)
    assert await world.attempts.expire(waiting, "its hold is over")
    assert await world.pool.fetchval("SELECT count(*) FROM job_folders") == 0
    # Whatever the clock says: there is nothing to hand out.
    assert await folders_of(world, run_state_retention_s=0.0, checkpoint_retention_s=0.0).claim("n1") == []


async def test_a_folder_that_was_taken_over_is_finished_by_its_claim_alone(world: World) -> None:
    await world.add_node()
    await ended_job(world)
    folders = folders_of(world)
    await age(world, 2 * DAY)
    (first,) = await folders.claim("n1")
    await world.pool.execute("UPDATE job_folders SET claimed_until = now()")
    (second,) = await folders.claim("n2")
    assert not await folders.finish(first.ref, "n1", first.claim)
    assert not await folders.finish(second.ref, "n1", second.claim)
    assert await world.pool.fetchval("SELECT stage FROM job_folders") == 0
    assert await folders.finish(second.ref, "n2", second.claim)
    assert not await folders.finish(second.ref, "n2", second.claim)
    assert await world.pool.fetchval("SELECT stage FROM job_folders") == 1
