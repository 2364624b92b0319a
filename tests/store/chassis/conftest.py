"""A migrated database, a bus and an outbox per test."""

from collections.abc import AsyncIterator

import pytest_asyncio

from chassis.bus.connection import connect
from chassis.bus.outbox import Outbox
from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import open_pool
from chassis.ids import SystemIds
from tests.harness.endings import end_all
from tests.harness.fixtures import SettingsFactory
from tests.store.chassis.world import World


@pytest_asyncio.fixture(loop_scope="session")
async def world(make_settings: SettingsFactory) -> AsyncIterator[World]:
    settings = make_settings(
        "prober",
        outbox_poll_s=0.2,
        outbox_lease_s=1.0,
        publish_timeout_s=1.0,
        consumer_fetch_wait_s=0.3,
        consumer_ack_wait_s=10.0,
        consumer_backoff_s_min=0.01,
        consumer_failures_max=3,
        reconnect_backoff_s_max=0.1,
    )
    pool = await open_pool(settings)
    await migrate(pool, [])
    await pool.execute("TRUNCATE outbox, inbox, handler_failures, dead_letters, streams")
    await pool.execute("CREATE TABLE IF NOT EXISTS effects (name text, amount bigint)")
    await pool.execute("TRUNCATE effects")
    bus = await connect(settings)
    world = World(
        settings=settings,
        pool=pool,
        bus=bus,
        outbox=Outbox(settings, clock=SystemClock(), ids=SystemIds()),
    )
    yield world
    await end_all(world.tasks)
    for stream in await world.bus.jetstream.streams_info():
        await world.bus.jetstream.delete_stream(stream.config.name)
    await world.bus.client.close()
    await pool.close()
