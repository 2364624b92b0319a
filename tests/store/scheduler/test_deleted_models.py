"""Models that their owners deleted: when their files go, what holds that up, and that nobody starts from them."""

from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from chassis.bus.envelope import EventInfo
from chassis.errors import NotFound
from chassis.timestamps import time_to_proto
from finemesh.events.v1 import model_events_pb2
from finemesh.nodes.v1 import node_pb2
from services.scheduler.admission import continuation
from services.scheduler.database import MIGRATIONS
from services.scheduler.folders.convert import folder_to_proto
from services.scheduler.folders.deleted_models import DeletedModels
from services.scheduler.folders.job_folders import JobFolders
from services.scheduler.jobs.convert import encoded, job_name
from services.scheduler.jobs.job import JobRef, LeaseRef
from services.scheduler.spec.origin import Origin, OriginName
from tests.harness.parties import as_another
from tests.store.scheduler.test_job_folders import ended_job
from tests.store.scheduler.world import PROJECT, World

GRACE = timedelta(days=7, seconds=1)


def folders_of(world: World) -> JobFolders:
    return JobFolders(world.database, world.ids, world.settings)


async def tell(world: World, ref: JobRef, *, lock_timeout: str = "5s") -> None:
    """Delivers the event as the consumer does, under a new id each time: the handler has to stand that."""
    event = model_events_pb2.ModelDeleted(
        model="projects/p/models/ml_1", tuning_job=job_name(ref), event_time=time_to_proto(world.clock.now())
    )
    info = EventInfo(
        id=world.ids.uuid(),
        type=event.DESCRIPTOR.full_name,
        source="inference",
        subject=event.model,
        time=world.clock.now(),
        deliveries=1,
    )
    async with world.database.writing() as connection:
        await connection.execute(f"SET LOCAL lock_timeout = '{lock_timeout}'")
        await DeletedModels(folders_of(world)).model_deleted(connection, event, info)


async def test_an_imported_adapter_has_no_folder_of_a_job(world: World) -> None:
    """Nothing is noted, and the event is no dead letter."""
    event = model_events_pb2.ModelDeleted(model="projects/p/models/ml_1", event_time=time_to_proto(world.clock.now()))
    info = EventInfo(
        id=world.ids.uuid(),
        type=event.DESCRIPTOR.full_name,
        source="inference",
        subject=event.model,
        time=world.clock.now(),
        deliveries=1,
    )
    async with world.database.writing() as connection:
        await DeletedModels(folders_of(world)).model_deleted(connection, event, info)
        assert await connection.fetchval("SELECT count(*) FROM deleted_models") == 0


async def deleted_job(world: World) -> LeaseRef:
    """Its folder was cleaned for the first time, and its model was deleted longer ago than models are kept then."""
    lease = await ended_job(world)
    await world.pool.execute("UPDATE job_folders SET stage = 1")
    await tell(world, lease)
    await age(world)
    return lease


async def age(world: World) -> None:
    await world.pool.execute("UPDATE deleted_models SET delete_time = delete_time - $1::interval", GRACE)


async def origin_of(world: World, ref: JobRef) -> Origin:
    return await continuation.find_origin(world.pool, PROJECT, OriginName(project_id=PROJECT, job_id=ref.job_id))


async def test_the_files_of_a_deleted_model_go_after_a_while_and_its_checkpoints_stay(world: World) -> None:
    await world.add_node()
    lease = await ended_job(world)
    await tell(world, lease)
    folders = folders_of(world)
    assert (await world.job(lease)).model_delete_time == world.clock.now()
    assert await folders.claim("n1") == []
    await age(world)
    # What the run left is handed out first, for a day after its end its attempts may still write there.
    assert await folders.claim("n1") == []
    await world.pool.execute("UPDATE job_folders SET stage = 1")
    (folder,) = await folders.claim("n1")
    message = folder_to_proto(folder)
    assert (message.HasField("model"), len(message.checkpoints)) == (False, 3)
    # Another replica hands out nothing twice, and a second node finishes nothing.
    assert await folders_of(world).claim("n2") == []
    assert not await folders.finish(folder.ref, "n2", folder.claim)
    assert await folders.finish(folder.ref, "n1", folder.claim)
    assert await world.pool.fetchval("SELECT count(*) FROM deleted_models") == 0
    # The checkpoints have their own time.
    assert await world.pool.fetchval("SELECT stage FROM job_folders") == 1


async def test_a_node_that_dies_in_the_middle_leaves_it_to_another(world: World) -> None:
    await world.add_node()
    await deleted_job(world)
    folders = folders_of(world)
    (first,) = await folders.claim("n1")
    await world.pool.execute("UPDATE deleted_models SET claimed_until = now()")
    (second,) = await folders.claim("n2")
    assert not await folders.finish(first.ref, "n1", first.claim)
    assert await folders.finish(second.ref, "n2", second.claim)


async def test_the_folder_and_the_model_of_a_job_are_finished_each_for_itself(world: World) -> None:
    await world.add_node()
    await deleted_job(world)
    await world.pool.execute("UPDATE job_folders SET ended_at = ended_at - interval '31 days'")
    folders = folders_of(world)
    checkpoints, model = await folders.claim("n1")
    assert (checkpoints.kept.model is None, model.kept.model is None) == (False, True)
    assert await folders.finish(model.ref, "n1", model.claim)
    assert await world.pool.fetchval("SELECT count(*) FROM job_folders") == 1
    assert await folders.finish(checkpoints.ref, "n1", checkpoints.claim)
    assert await world.pool.fetchval("SELECT count(*) FROM job_folders") == 0


async def test_a_job_that_starts_from_the_model_holds_it_until_its_end(world: World) -> None:
    await world.add_node(devices=2)
    made = await ended_job(world)
    waiting = await world.queued_job(start_model_job_id=made.job_id)
    await world.pool.execute("UPDATE job_folders SET stage = 1")
    await tell(world, made)
    await age(world)
    folders = folders_of(world)
    assert await folders.claim("n1") == []
    await world.placer.place_round()
    running = await world.lease_of(waiting)
    await world.reports.start(running)
    assert await folders.claim("n1") == []
    assert await world.attempts.expire(running, "its hold is over")
    assert [folder.ref.job_id for folder in await folders.claim("n1")] == [made.job_id]


async def test_told_twice_late_or_of_a_job_that_is_not_there_nothing_happens(world: World) -> None:
    await world.add_node()
    lease = await deleted_job(world)
    first = await world.pool.fetchval("SELECT delete_time FROM deleted_models")
    await world.clock.advance(60.0)
    await tell(world, lease)
    assert await world.pool.fetchval("SELECT delete_time FROM deleted_models") == first
    (folder,) = await folders_of(world).claim("n1")
    await folders_of(world).finish(folder.ref, "n1", folder.claim)
    before = await world.everything()
    await tell(world, lease)
    await tell(world, JobRef(project_id=PROJECT, job_id="ft-none"))
    # A job is found under its project alone.
    await tell(world, JobRef(project_id="proj_b", job_id=lease.job_id))
    assert await world.everything() == before


async def test_nobody_starts_from_a_model_that_was_deleted(world: World) -> None:
    await world.add_node()
    lease = await ended_job(world)
    origin = await origin_of(world, lease)
    await tell(world, lease)
    with pytest.raises(NotFound, match="was deleted; name another job or model, or a checkpoint") as refused:
        await origin_of(world, lease)
    assert refused.value.violations[0].field == "spec.from_checkpoint"
    # Nor who found it just before.
    with pytest.raises(NotFound, match="was deleted"):
        async with world.database.writing() as connection:
            await continuation.keep(connection, PROJECT, origin)
    # Its kept checkpoints are there as before.
    name = OriginName(project_id=PROJECT, job_id=lease.job_id, step=4)
    assert (await continuation.find_origin(world.pool, PROJECT, name)).step == 4


async def test_a_deletion_waits_for_who_is_about_to_start_from_the_model(world: World) -> None:
    await world.add_node()
    lease = await ended_job(world)
    origin = await origin_of(world, lease)
    async with world.database.writing() as connection:
        await continuation.keep(connection, PROJECT, origin)
        with pytest.raises(asyncpg.LockNotAvailableError):
            await as_another(tell(world, lease, lock_timeout="50ms"))
    await tell(world, lease)


async def test_jobs_from_before_the_migration_hold_their_model_as_well(world: World) -> None:
    await world.add_node()
    of_model = node_pb2.StartWeights(tuning_job="projects/proj_a/tuningJobs/ft-1", revision="rv_1")
    of_model.artifact.key = "jobs/x/"
    of_checkpoint = node_pb2.StartWeights(tuning_job="projects/proj_a/tuningJobs/ft-2", step=4)
    of_hub = node_pb2.StartWeights(revision="abc")
    of_hub.hub.repository = "a/b"
    starts = [of_model, of_checkpoint, of_hub, None]
    jobs = [await world.new_job(start_weights=None if start is None else encoded(start)) for start in starts]
    statements = Path(MIGRATIONS / "0017_deleted_models.sql").read_text().split(";")
    (update,) = [statement for statement in statements if "UPDATE jobs" in statement]
    await world.pool.execute(update)
    found = {
        row["job_id"]: row["start_model_job_id"]
        for row in await world.pool.fetch("SELECT job_id, start_model_job_id FROM jobs")
    }
    assert [found[job.job_id] for job in jobs] == ["ft-1", None, None, None]
