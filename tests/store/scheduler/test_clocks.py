"""Clocks that are set: leases are judged by the database's time, and not while that has just jumped."""

from typing import Any

import pytest

from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.jobs.store import JobStore
from services.scheduler.placement.store import AllocationStore
from tests.store.scheduler.test_claims import Holds, releaser, validate_one, validator
from tests.store.scheduler.test_fencing import FAILURE
from tests.store.scheduler.test_resume import beat, sweep_for
from tests.store.scheduler.world import LIMITS, World, metric


@pytest.mark.parametrize("step_s", [30.0, -30.0, 86_400.0])
async def test_a_step_of_the_schedulers_own_clock_ends_no_lease(world: World, step_s: float) -> None:
    await world.add_node()
    lease = await world.running_job()
    await sweep_for(world, 12, silent=False)
    world.clock.stepped_s = step_s
    async with world.database.writing() as connection:
        await world.nodes.see(connection, "n1", "i1", world.ids.uuid())
        await AllocationStore(connection).renew_leases("n1", "i1", [lease.lease_token], **LIMITS)
    await world.sweeper.sweep()
    assert (await world.job(lease)).state is JobState.RUNNING
    left_s = await world.pool.fetchval("SELECT extract(epoch FROM expires_at - now()) FROM allocations")
    assert 0 < left_s <= 10.0


async def test_a_jump_of_the_databases_clock_begins_the_watch_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.add_node()
    lease = await world.running_job()
    await sweep_for(world, 12, silent=False)
    # All that is written is 30 s old at once, and the database says so.
    await world.pool.execute("UPDATE nodes SET seen_at = seen_at - interval '30 s'")
    await world.pool.execute("UPDATE allocations SET expires_at = expires_at - interval '30 s'")
    honest: Any = AllocationStore.time

    async def jumped(store: AllocationStore) -> Any:
        return await store._connection.fetchval("SELECT now() + interval '30 s'")

    monkeypatch.setattr(AllocationStore, "time", jumped)
    world.clock.jump(1.0)
    await world.sweeper.sweep()
    assert (await world.job(lease)).state is JobState.RUNNING
    assert await world.pool.fetchval("SELECT state FROM nodes") == "READY"
    # The nodes are heard again; who is silent afterwards is judged as ever.
    monkeypatch.setattr(AllocationStore, "time", honest)
    await beat(world)
    await sweep_for(world, 14, silent=False)
    assert (await world.job(lease)).state is JobState.RUNNING
    await sweep_for(world, 12, silent=True)
    assert (await world.job(lease)).state is JobState.QUEUED


async def test_a_clock_that_is_set_back_between_the_look_and_its_judgement_ends_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the time of the look all that was written after the jump is long over."""
    await world.add_node()
    lease = await world.running_job()

    async def before_the_jump(store: AllocationStore) -> Any:
        return await store._connection.fetchval("SELECT now() + interval '30 s'")

    monkeypatch.setattr(AllocationStore, "time", before_the_jump)
    for _ in range(12):
        world.clock.jump(1.0)
        await world.pool.execute("UPDATE nodes SET seen_at = now() + interval '30 s'")
        await world.pool.execute("UPDATE allocations SET expires_at = now() + interval '40 s'")
        await world.sweeper.sweep()
    await beat(world)
    world.clock.jump(1.0)
    await world.sweeper.sweep()
    assert await world.pool.fetchval("SELECT state FROM nodes") == "READY"
    assert (await world.job(lease)).state is JobState.RUNNING


async def test_a_job_that_was_queued_by_a_clock_that_was_ahead_waits_no_longer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.add_node()
    ref = await world.queued_job()
    other, holds = await world.new_job(), Holds()
    assert await validator(world, holds).claim() is not None
    await sweep_for(world, 2, silent=False)
    # Both were written while the clock was an hour ahead; now it is right again.
    await world.pool.execute(
        "UPDATE jobs SET wake_at = now() + interval '1 h', claimed_until = claimed_until + interval '1 h'"
    )
    honest: Any = AllocationStore.time

    async def ahead(store: AllocationStore) -> Any:
        return await store._connection.fetchval("SELECT now() + interval '1 h'")

    monkeypatch.setattr(AllocationStore, "time", ahead)
    await world.sweeper.sweep()
    await world.pool.execute("UPDATE jobs SET wake_at = now() + interval '1 h'")
    assert not await world.placer.place_round()
    monkeypatch.setattr(AllocationStore, "time", honest)
    await world.sweeper.sweep()
    assert await world.placer.place_round()
    assert (await world.job(ref)).state is JobState.STARTING
    left_s = await world.pool.fetchval(
        "SELECT extract(epoch FROM claimed_until - now()) FROM jobs WHERE job_id = $1", other.job_id
    )
    assert left_s <= world.settings.claim_duration_s


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
async def test_a_replica_whose_clock_is_wrong_takes_no_claim_and_sleeps_no_longer(world: World, step_s: float) -> None:
    """Claims and wake-up times are written and compared by the database's clock."""
    ref, holds = await world.new_job(), Holds()
    first = await validator(world, holds).claim()
    assert first is not None
    world.clock.stepped_s = step_s
    assert await validator(world, holds).claim() is None
    await world.pool.execute("UPDATE jobs SET claimed_until = now()")
    second = await validator(world, holds).claim()
    assert second is not None
    # The claim of the one whose clock is wrong protects it from the others, too.
    world.clock.stepped_s = 0.0
    assert await validator(world, holds).claim() is None
    world.clock.stepped_s = step_s
    await validator(world, holds).validate(second)
    assert (await world.job(ref)).state is JobState.QUEUED
    await world.add_node()
    world.clock.stepped_s = 0.0
    assert await world.placer.place_round()
    await world.attempts.fail(await world.lease_of(ref), FAILURE, retryable=True)
    world.clock.stepped_s = step_s
    await world.pool.execute("UPDATE jobs SET wake_at = wake_at + interval '60 s'")
    assert not await world.placer.place_round()
    await world.pool.execute("UPDATE jobs SET wake_at = wake_at - interval '61 s'")
    assert await world.placer.place_round()


async def test_a_release_is_claimed_and_postponed_by_the_databases_time(world: World) -> None:
    ref, holds = await world.new_job(), Holds()
    await validate_one(validator(world, holds))
    await world.pool.execute("UPDATE jobs SET release_pending = true, claimed_until = now() + interval '60 s'")
    world.clock.stepped_s = 3600.0
    assert not await releaser(world, holds).release_one()
    await world.pool.execute("UPDATE jobs SET claimed_until = NULL")
    world.clock.stepped_s = -3600.0
    assert await releaser(world, holds).release_one()
    assert holds.released == [f"projects/{ref.project_id}/tuningJobs/{ref.job_id}"]


# The clock of these tests is years ahead of the database's, as it is.
@pytest.mark.parametrize("step_s", [0.0, -10 * 365 * 86_400.0])
async def test_progress_and_failures_of_attempts_are_judged_by_the_databases_time(world: World, step_s: float) -> None:
    """One that goes on is renewed, one that stands still is not, and failures count against a node for a while."""
    world.clock.stepped_s = step_s
    await world.add_node()
    lease = await world.running_job()
    short = {"duration_s": 10.0, "progress_s_max": 60.0}

    async def is_renewed() -> bool:
        async with world.database.writing() as connection:
            return bool(await AllocationStore(connection).renew_leases("n1", "i1", [lease.lease_token], **short))

    assert await is_renewed()
    await world.reports.report(lease, [metric(1)], [], [])
    assert await is_renewed()
    (remaining_s,) = await JobStore(world.pool).list_remaining_s()
    assert 0 < remaining_s <= 5
    await world.attempts.fail(lease, FAILURE, retryable=True)
    ages = await world.pool.fetchrow(
        "SELECT extract(epoch FROM now() - create_time), extract(epoch FROM now() - end_time) FROM attempts"
    )
    assert ages is not None
    assert all(0 <= age < 60 for age in ages)


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
async def test_the_queue_is_in_the_order_of_the_databases_time(world: World, step_s: float) -> None:
    """Whichever replica queued a job, and whatever its clock says; one that is queued again keeps its place."""
    world.clock.stepped_s = step_s
    first = await world.queued_job()
    world.clock.stepped_s = -step_s
    second = await world.queued_job()
    world.clock.stepped_s = 0.0
    third = await world.queued_job()
    assert await queue(world) == [first.job_id, second.job_id, third.job_id]
    await world.add_node()
    await world.placer.place_round()
    world.clock.stepped_s = step_s
    await world.attempts.fail(await world.lease_of(first), FAILURE, retryable=True)
    await world.pool.execute("UPDATE jobs SET wake_at = now()")
    assert await queue(world) == [first.job_id, second.job_id, third.job_id]
    times = [(await world.job(ref)).queue_time for ref in (first, second, third)]
    assert [time.timestamp() for time in times if time] == await JobStore(world.pool).queue_times()


async def queue(world: World) -> list[str]:
    return [job.ref.job_id for job in await JobStore(world.pool).list_queued(None, 10)]
