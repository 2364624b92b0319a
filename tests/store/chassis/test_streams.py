"""Streams with a limit, on a real server: a full one holds up no other, and what every reader has makes room."""

from typing import Any

from nats.js.errors import NotFoundError
from structlog.testing import capture_logs

from chassis.bus.connection import Bus
from chassis.bus.consumer import Consumer
from chassis.bus.envelope import EventInfo
from chassis.bus.relay import Relay
from chassis.clock import SystemClock
from chassis.db.pool import Connection
from tests.harness.polling import eventually
from tests.store.chassis.world import Counted, Elsewhere, World

MIB = 1024**2
LARGE = "x" * 300_000
WAITING = "SELECT count(*) FROM outbox WHERE published_at IS NULL AND subject = 'probe.counted'"


def narrow(world: World, **settings: Any) -> Relay:
    """A relay of a process whose streams hold three large events."""
    given = {"stream_size_bytes_max": MIB, "stream_look_interval_s": 0.01, "outbox_batch_max": 4, **settings}
    world.bus.settings = world.settings.model_copy(update=given)
    return Relay(world.pool, world.bus, world.outbox, clock=SystemClock())


def reader(world: World, durable: str) -> Consumer:
    async def note(connection: Connection, message: Any, event: EventInfo) -> None:
        await connection.execute("INSERT INTO effects (name, amount) VALUES ($1, $2)", durable, message.amount)

    return Consumer(world.pool, world.bus, durable, {Counted: note}, clock=SystemClock())


async def test_a_full_stream_does_not_hold_up_the_others(world: World) -> None:
    relay = narrow(world)
    for number in range(9):
        await world.add(Counted(name=LARGE, amount=number))
    world.spawn(relay.run)
    await world.until(WAITING, 6)
    for _ in range(9):
        await world.add(Elsewhere(name="small"))
    await world.until("SELECT count(*) FROM outbox WHERE subject = 'elsewhere.counted' AND published_at IS NOT NULL", 9)
    assert await world.pool.fetchval(WAITING) == 6


async def test_a_changed_setting_changes_the_stream_that_is_there(world: World) -> None:
    narrow(world)
    await world.bus.ensure_stream("PROBE")
    with capture_logs() as logs:
        for size in (2 * MIB, MIB):
            restarted = Bus(world.settings.model_copy(update={"stream_size_bytes_max": size}), world.bus.client)
            await restarted.ensure_stream("PROBE")
            assert (await world.bus.jetstream.stream_info("PROBE")).config.max_bytes == size
    assert [log["event"] for log in logs] == ["stream_settings_changed"] * 2


async def test_a_full_stream_takes_more_when_its_setting_is_raised(world: World) -> None:
    relay = narrow(world)
    for number in range(6):
        await world.add(Counted(name=LARGE, amount=number))
    running = world.spawn(relay.run)
    await world.until(WAITING, 3)
    running.cancel()
    world.spawn(narrow(world, stream_size_bytes_max=4 * MIB).run)
    await world.until(WAITING, 0)


async def test_what_every_reader_has_makes_room(world: World) -> None:
    relay = narrow(world)
    for durable in ("one", "two"):
        world.spawn(reader(world, durable).run)
    world.spawn(relay.run)
    for number in range(20):
        await world.add(Counted(name=LARGE, amount=number))
    await world.until("SELECT count(DISTINCT (name, amount)) FROM effects", 40)


async def test_what_a_reader_still_has_to_handle_stays_and_is_warned_of(world: World) -> None:
    relay = narrow(world)
    # It is known to the bus, and away.
    away = reader(world, "away")
    running = world.spawn(away.run)

    async def readers() -> int:
        try:
            return len(await world.bus.jetstream.consumers_info("PROBE"))
        except NotFoundError:
            return 0

    await eventually(readers, lambda count: count == 1)
    await away.stop()
    await running
    world.spawn(reader(world, "here").run)
    with capture_logs() as logs:
        world.spawn(relay.run)
        for number in range(9):
            await world.add(Counted(name=LARGE, amount=number))
        await world.until(WAITING, 6)
        await world.until("SELECT count(*) FROM effects", 3)
        await eventually(
            lambda: _events(logs), lambda events: "stream_fills_up" in events and "publish_failed" in events
        )
    assert "stream_trimmed" not in await _events(logs)
    world.spawn(reader(world, "away").run)
    await world.until("SELECT count(DISTINCT (name, amount)) FROM effects", 18)


async def _events(logs: list[Any]) -> set[str]:
    return {log["event"] for log in logs}
