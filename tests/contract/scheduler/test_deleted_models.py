"""What users see of a job whose model they deleted, from the event on the bus to the refusal of a run on it."""

import pytest

from chassis.bus.outbox import Outbox
from chassis.clock import SystemClock
from chassis.db.pool import open_pool, transaction
from chassis.errors import NotFound
from chassis.identity import acting_as
from chassis.ids import SystemIds
from finemesh.events.v1 import model_events_pb2
from finemesh.tuning.v1 import tuning_service_pb2
from tests.contract.scheduler.world import OWNER, World
from tests.harness.polling import eventually


async def test_a_job_shows_that_its_model_was_deleted_and_no_run_starts_from_it(world: World) -> None:
    async with world.agent() as agent:
        made = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        await agent.succeed(assignment)
    job_id = made.rpartition("/")[2]
    assert not (await world.until(made, "SUCCEEDED")).HasField("model_delete_time")
    deleted = model_events_pb2.ModelDeleted(model="projects/proj_a/models/ml_1", tuning_job=made)
    deleted.event_time.GetCurrentTime()
    # Whoever writes it into an outbox: the relay of this process carries it as well as that of inference.
    pool = await open_pool(world.settings)
    async with transaction(pool) as connection:
        outbox = Outbox(world.settings, clock=SystemClock(), ids=SystemIds())
        await outbox.add(connection, deleted, subject_name=deleted.model)

    async def shows_it() -> bool:
        return (await world.get(made)).HasField("model_delete_time")

    assert await eventually(shows_it)
    assert (await world.get(made)).model_delete_time == deleted.event_time
    spec, holds = world.spec(from_checkpoint=job_id), len(world.script.holds)
    with acting_as(OWNER):
        for refused_call in (
            world.tuning.CreateTuningJob(tuning_service_pb2.CreateTuningJobRequest(spec=spec)),
            world.tuning.QuoteTuningJob(tuning_service_pb2.QuoteTuningJobRequest(spec=spec)),
        ):
            with pytest.raises(NotFound, match=f"the model of {job_id} was deleted; name another job or model"):
                await refused_call
    assert len(world.script.holds) == holds
    assert await pool.fetchval("SELECT count(*) FROM deleted_models WHERE job_id = $1", job_id) == 1
    await pool.close()
