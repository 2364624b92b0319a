"""Clocks that are set: leases are judged by the database's time, and not while that has just jumped."""

from typing import Any

import pytest

from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.placement.store import AllocationStore
from tests.store.scheduler.test_resume import beat, sweep_for
from tests.store.scheduler.world import LIMITS, World


@pytest.mark.parametrize("step_s", [30.0, -30.0, 86_400.0])
async def test_a_step_of_the_schedulers_own_clock_ends_no_lease(world: World, step_s: float) -> None:
    await world.add_node()
    lease = await world.running_job()
    await sweep_for(world, 12, silent=False)
    world.clock.stepped_s = step_s
    async with world.database.writing() as connection:
        await world.nodes.see(connection, "n1", "i1")
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
