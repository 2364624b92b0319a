"""Months of events from outbox to inbox, in virtual time: streams and tables are after 128 days as after 32.

A day is a batch of events, then everything that has a time is made a day older, and the relay's own pruning runs. What
grows with the number of events is seen at any number; `make soak` does the same at a high rate for as long as wanted.
"""

from typing import Any

from chassis.bus.consumer import Consumer
from chassis.bus.durables import Durable
from chassis.bus.envelope import EventInfo
from chassis.bus.outbox import prune
from chassis.bus.relay import Relay
from chassis.clock import SystemClock
from chassis.db.pool import Connection, transaction
from tests.harness.polling import eventually
from tests.store.chassis.world import Counted, World

EVENTS_A_DAY = 20
DAYS = 32
DAY_AND_NIGHT = """
    UPDATE outbox SET created_at = created_at - interval '1 day', published_at = published_at - interval '1 day';
    UPDATE inbox SET handled_at = handled_at - interval '1 day';
    UPDATE handler_failures SET failed_at = failed_at - interval '1 day';
    UPDATE streams SET handled_time = handled_time - interval '1 day', seen_time = seen_time - interval '1 day';
"""
TABLES = ("outbox", "inbox", "handler_failures", "dead_letters", "streams")


async def measured(world: World) -> dict[str, int]:
    found = {"stream": (await world.bus.jetstream.stream_info("PROBE")).state.messages}
    for table in TABLES:
        # As autovacuum would, which has no time to come in these seconds.
        await world.pool.execute(f"VACUUM {table}")
        found[table] = await world.pool.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608
        found[f"{table} bytes"] = await world.pool.fetchval("SELECT pg_total_relation_size($1::regclass)", table)
    return found


async def test_streams_and_tables_are_flat_over_months(world: World) -> None:
    handled = 0

    async def count(connection: Connection, message: Any, event: EventInfo) -> None:
        nonlocal handled
        handled += 1

    world.bus.durables = {"PROBE": (Durable(name="prober", subjects=("probe.counted",)),)}
    relay = Relay(world.pool, world.bus, world.outbox, clock=SystemClock())
    world.spawn(Consumer(world.pool, world.bus, "prober", {Counted: count}, clock=SystemClock()).run)

    async def is_empty() -> bool:
        await relay._keeper.look_after_all()
        return (await world.bus.jetstream.stream_info("PROBE")).state.messages == 0

    sizes: dict[int, dict[str, int]] = {}
    for day in range(1, 4 * DAYS + 1):
        async with transaction(world.pool) as connection:
            for number in range(EVENTS_A_DAY):
                event = Counted(name="x" * 500, amount=number)
                await world.outbox.add(connection, event, subject_name="probes/1")
        while (await relay.publish_batch())[0]:
            pass
        await eventually(is_empty, pause_s=0.005)
        await world.pool.execute(DAY_AND_NIGHT)
        async with transaction(world.pool) as connection:
            await prune(connection, world.settings)
        if day in (DAYS, 4 * DAYS):
            sizes[day] = await measured(world)
        elif day % 8 == 0:
            await measured(world)
    assert handled == 4 * DAYS * EVENTS_A_DAY
    early, late = sizes[DAYS], sizes[4 * DAYS]
    assert (late["stream"], late["outbox"], late["inbox"]) == (0, 6 * EVENTS_A_DAY, 29 * EVENTS_A_DAY)
    rows = {name: late[name] for name in early if not name.endswith("bytes")}
    assert rows == {name: early[name] for name in rows}
    for name in early.keys() - rows.keys():
        assert late[name] <= 1.25 * early[name], (name, early, late)
