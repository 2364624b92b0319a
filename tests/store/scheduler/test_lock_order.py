"""Locks in the order node, job, allocation; and no limit that says nothing."""

import asyncio

import asyncpg
from structlog.testing import capture_logs

from services.scheduler.jobs.lifecycle import JobState
from tests.harness.polling import eventually
from tests.store.scheduler.world import World

WAITS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


async def test_a_registration_and_a_report_at_the_same_moment_do_not_block_each_other(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    reporting = await asyncpg.connect(world.settings.database_url)
    watching = await asyncpg.connect(world.settings.database_url)
    try:
        transaction = reporting.transaction()
        await transaction.start()
        # What every report of an ending does first, and last.
        await reporting.execute("SELECT FROM jobs WHERE job_id = $1 FOR UPDATE", lease.job_id)
        registering = asyncio.create_task(world.add_node(incarnation="i2", listens=False))
        await eventually(lambda: watching.fetchval(WAITS))
        await reporting.execute("UPDATE allocations SET released_at = now() WHERE lease_token = $1", lease.lease_token)
        await transaction.rollback()
        await registering
    finally:
        await reporting.close()
        await watching.close()
    assert (await world.job(lease)).state is JobState.QUEUED
    assert await world.pool.fetchval("SELECT incarnation FROM nodes") == "i2"


async def test_the_limit_of_nodes_counts_nodes_and_says_when_it_leaves_some_out(world: World) -> None:
    for number in range(3):
        await world.add_node(f"n{number}", devices=2)
    await world.pool.execute("UPDATE devices SET hardware_type = 'gpu' WHERE device_index = 1")
    # The largest name would come last, but it is the only one that is there.
    await world.pool.execute("UPDATE nodes SET state = 'LOST' WHERE node <> 'n2'")
    object.__setattr__(world.settings, "nodes_max", 3)
    try:
        await world.queued_job()
        with capture_logs() as logs:
            assert await world.placer.place_round()
        assert not [entry for entry in logs if entry["event"] == "fleet_cut_off"]
        object.__setattr__(world.settings, "nodes_max", 1)
        await world.queued_job()
        with capture_logs() as logs:
            assert await world.placer.place_round()
        (told,) = [entry for entry in logs if entry["event"] == "fleet_cut_off"]
        assert (told["nodes_max"], told["nodes_left_out"]) == (1, 2)
    finally:
        object.__setattr__(world.settings, "nodes_max", type(world.settings)().nodes_max)
