"""Sealed secrets in the tables: whose they are, what another key makes of them, and that every ending deletes them."""

from collections.abc import Awaitable, Callable

import pytest

from chassis.errors import Aborted
from finemesh.tuning.v1 import tuning_secrets_pb2
from services.scheduler.jobs.endings import JobFailure
from services.scheduler.jobs.job import JobRef, LeaseRef
from services.scheduler.jobs.job_secrets import JobSecrets
from services.scheduler.jobs.secret_box import SecretBox
from services.scheduler.spec.integrations import ProvidedSecrets
from tests.store.scheduler.world import World, model

KEY = "0123456789abcdef" * 3
GIVEN = ProvidedSecrets(wandb_api_key="wandb-key", hub_token="")
FAILURE = JobFailure(reason="TRAINING_INPUT_INVALID", message="loss is not a number", platform_fault=False)
TOLD = tuning_secrets_pb2.TuningSecrets(wandb_api_key="wandb-key")
NOTHING = tuning_secrets_pb2.TuningSecrets()


async def kept(world: World, ref: JobRef) -> None:
    async with world.database.writing() as connection:
        await JobSecrets(world.database, SecretBox(KEY)).keep(connection, ref, GIVEN)


async def count(world: World, ref: JobRef) -> int:
    found: int = await world.pool.fetchval("SELECT count(*) FROM job_secrets WHERE job_id = $1", ref.job_id)
    return found


async def running(world: World) -> LeaseRef:
    """A running job with secrets."""
    await world.add_node()
    ref = await world.running_job()
    await kept(world, ref)
    return ref


async def test_another_key_opens_nothing_and_nobody_waits_for_it(world: World) -> None:
    ref = await running(world)
    assert await JobSecrets(world.database, SecretBox(KEY)).fetch(ref) == TOLD
    assert await JobSecrets(world.database, SecretBox(KEY[::-1])).fetch(ref) == NOTHING
    assert await JobSecrets(world.database, None).fetch(ref) == NOTHING


async def test_a_row_that_was_moved_to_another_job_stays_shut(world: World) -> None:
    ref = await running(world)
    await world.add_node("n2")
    thief = await world.running_job()
    await world.pool.execute("UPDATE job_secrets SET job_id = $1", thief.job_id)
    assert await JobSecrets(world.database, SecretBox(KEY)).fetch(thief) == NOTHING
    assert await JobSecrets(world.database, SecretBox(KEY)).fetch(ref) == NOTHING


async def test_a_lost_lease_and_a_foreign_project_are_told_nothing_and_the_next_attempt_everything(
    world: World,
) -> None:
    old = await running(world)
    assert await world.lose(old)
    assert await count(world, old) == 1
    new = await world.place_again(old)
    foreign = LeaseRef(project_id="proj_b", job_id=new.job_id, lease_token=new.lease_token)
    for wrong in (old, foreign):
        with pytest.raises(Aborted) as refused:
            await JobSecrets(world.database, SecretBox(KEY)).fetch(wrong)
        assert refused.value.reason == "LEASE_STALE"
    assert await JobSecrets(world.database, SecretBox(KEY)).fetch(new) == TOLD


ENDINGS: dict[str, Callable[[World, LeaseRef], Awaitable[object]]] = {
    "succeeded": lambda world, lease: world.attempts.succeed(lease, model()),
    "failed": lambda world, lease: world.attempts.fail(lease, FAILURE, retryable=False),
    "expired": lambda world, lease: world.attempts.expire(lease, "the hold is over"),
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_every_ending_deletes_them_and_only_those_of_its_job(world: World, name: str) -> None:
    ref = await running(world)
    other = await world.queued_job()
    await kept(world, other)
    await ENDINGS[name](world, ref)
    assert (await count(world, ref), await count(world, other)) == (0, 1)
