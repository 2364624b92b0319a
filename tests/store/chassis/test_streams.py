"""Streams on a real server: what every reader has leaves them, a full one holds up no other, and what a lost disk held
is published again.
"""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.js import api
from nats.js.errors import NotFoundError, ServerError
from structlog.testing import capture_logs

from chassis.bus.connection import Bus
from chassis.bus.consumer import Consumer
from chassis.bus.durables import Durable
from chassis.bus.envelope import EventInfo
from chassis.bus.relay import Relay
from chassis.clock import SystemClock
from chassis.db.pool import Connection
from tests.harness.endings import end_all
from tests.harness.polling import eventually
from tests.harness.servers import NatsServer
from tests.store.chassis.world import Counted, Elsewhere, World

MIB = 1024**2
LARGE = "x" * 300_000
WAITING = "SELECT count(*) FROM outbox WHERE published_at IS NULL AND subject = 'probe.counted'"


def narrow(world: World, *readers: str, **settings: Any) -> Relay:
    """A relay of a process whose streams hold three large events; the readers are declared."""
    given = {
        "stream_size_bytes_max": MIB,
        "stream_look_interval_s": 0.01,
        "outbox_batch_max": 4,
        "outbox_look_whole_s": 1.0,
        **settings,
    }
    world.bus.settings = world.settings.model_copy(update=given)
    world.bus.durables = {"PROBE": tuple(Durable(name=name, subjects=("probe.counted",)) for name in readers)}
    return Relay(world.pool, world.bus, world.outbox, clock=SystemClock())


def reader(world: World, durable: str) -> Consumer:
    async def note(connection: Connection, message: Any, event: EventInfo) -> None:
        await connection.execute("INSERT INTO effects (name, amount) VALUES ($1, $2)", durable, message.amount)

    return Consumer(world.pool, world.bus, durable, {Counted: note}, clock=SystemClock())


async def size(world: World) -> int:
    return (await world.bus.jetstream.stream_info("PROBE")).state.messages


async def test_a_full_stream_does_not_hold_up_the_others(world: World) -> None:
    relay = narrow(world, "away")
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
    relay = narrow(world, "away")
    for number in range(6):
        await world.add(Counted(name=LARGE, amount=number))
    running = world.spawn(relay.run)
    await world.until(WAITING, 3)
    await end_all([running])
    world.spawn(narrow(world, "away", stream_size_bytes_max=4 * MIB).run)
    await world.until(WAITING, 0)


async def test_what_every_reader_has_leaves_the_stream_at_any_size(world: World) -> None:
    relay = narrow(world, "one", "two", stream_size_bytes_max=64 * MIB, outbox_batch_max=50)
    for durable in ("one", "two"):
        world.spawn(reader(world, durable).run)
    world.spawn(relay.run)
    for number in range(200):
        await world.add(Counted(name="small", amount=number))
    await world.until("SELECT count(DISTINCT (name, amount)) FROM effects", 400)
    await eventually(lambda: size(world), lambda count: count == 0)


async def test_a_declared_reader_that_has_not_come_yet_loses_nothing(world: World) -> None:
    """Also not when the reader was deleted on the server, and with it all that the server knew of it."""
    relay = narrow(world, "here", "later", stream_size_bytes_max=64 * MIB, outbox_batch_max=50)
    world.spawn(relay.run)
    world.spawn(reader(world, "here").run)
    for number in range(50):
        await world.add(Counted(name="small", amount=number))
    await world.until("SELECT count(*) FROM effects", 50)
    assert await size(world) == 50
    await world.bus.jetstream.delete_consumer("PROBE", "later")
    for number in range(50, 60):
        await world.add(Counted(name="small", amount=number))
    await world.until("SELECT count(*) FROM effects", 60)
    world.spawn(reader(world, "later").run)
    await world.until("SELECT count(DISTINCT (name, amount)) FROM effects", 120)
    await eventually(lambda: size(world), lambda count: count == 0)


async def test_a_stream_that_no_service_reads_keeps_the_newest_and_stops_nobody(world: World) -> None:
    relay = narrow(world)
    world.spawn(relay.run)
    for number in range(9):
        await world.add(Counted(name=LARGE, amount=number))
    await world.until(WAITING, 0)
    assert await size(world) == 3


async def test_what_a_reader_still_has_to_handle_stays_and_is_warned_of(world: World) -> None:
    relay = narrow(world, "away", "here")
    told: list[bool] = []

    async def tell(well: bool) -> None:
        told.append(well)

    world.bus.room.report_to(tell)
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
    assert told[0] is False
    world.spawn(reader(world, "away").run)
    await world.until("SELECT count(DISTINCT (name, amount)) FROM effects", 18)
    await eventually(lambda: _told(told), lambda heard: heard[-1])


async def _events(logs: list[Any]) -> set[str]:
    return {log["event"] for log in logs}


async def _told(told: list[bool]) -> list[bool]:
    return told


@asynccontextmanager
async def wiped(nats_server: NatsServer, keep: Path | None = None) -> AsyncIterator[None]:
    """The server is killed; it comes back with an empty disk, or with what `keep` has of an earlier one."""
    await nats_server.kill()
    store = nats_server.broker.folder / "jetstream"
    assert store.is_dir(), sorted(nats_server.broker.folder.iterdir())
    shutil.rmtree(store)
    if keep is not None:
        shutil.copytree(keep, store)
    yield
    await nats_server.start()


@pytest.mark.parametrize("restored", [False, True], ids=["empty", "earlier"])
async def test_a_server_that_lost_its_disk_gets_again_what_was_not_handled(
    world: World, nats_server: NatsServer, tmp_path: Path, restored: bool
) -> None:
    """Thirty events that both readers have, then thirty that one of them has not, then the disk is gone."""
    relay = narrow(world, "one", "two", stream_size_bytes_max=64 * MIB, outbox_batch_max=50)
    world.spawn(relay.run)
    one, two = world.spawn(reader(world, "one").run), world.spawn(reader(world, "two").run)
    for number in range(30):
        await world.add(Counted(name="small", amount=number))
    await world.until("SELECT count(*) FROM effects", 60)
    await eventually(lambda: size(world), lambda count: count == 0)
    await world.until("SELECT handled_time > '-infinity' FROM streams", True)
    if restored:
        await nats_server.kill()
        shutil.copytree(nats_server.broker.folder / "jetstream", tmp_path / "earlier")
        await nats_server.start()
    await end_all([two])
    for number in range(30, 60):
        await world.add(Counted(name="small", amount=number))
    await world.until("SELECT count(*) FROM effects", 90)
    await world.until(WAITING, 0)
    await world.until("SELECT last_sequence FROM streams", 60)
    async with wiped(nats_server, tmp_path / "earlier" if restored else None):
        pass
    # Nobody publishes anything: the look finds the loss.
    await world.until("SELECT epoch FROM streams", 2)
    again = world.spawn(reader(world, "two").run)
    await world.until("SELECT count(DISTINCT (name, amount)) FROM effects", 120)
    for number in range(60, 70):
        await world.add(Counted(name="small", amount=number))
    await world.until("SELECT count(*) FROM effects", 140)
    await eventually(lambda: size(world), lambda count: count == 0)
    published = "SELECT count(*) FROM outbox WHERE published_at IS NOT NULL"
    await world.until(published, 70)
    assert await world.pool.fetchval("SELECT count(*) FROM effects") == 140, "each of them once"
    assert not one.done() and not again.done()


async def test_what_was_handled_everywhere_is_not_published_again(world: World, nats_server: NatsServer) -> None:
    relay = narrow(world, "one", stream_size_bytes_max=64 * MIB, outbox_batch_max=50)
    world.spawn(relay.run)
    world.spawn(reader(world, "one").run)
    for number in range(20):
        await world.add(Counted(name="small", amount=number))
    await world.until("SELECT count(*) FROM effects", 20)
    await world.until("SELECT handled_time > (SELECT max(published_at) FROM outbox) FROM streams", True)
    await world.add(Counted(name="small", amount=20))
    await world.until("SELECT count(*) FROM effects", 21)
    with capture_logs() as logs:
        async with wiped(nats_server):
            pass
        await world.until("SELECT epoch = 2 AND again_until IS NULL FROM streams", True)
    again = sum(log["events"] for log in logs if log["event"] == "events_published_again")
    assert again <= 1
    await world.add(Counted(name="small", amount=21))
    await world.until("SELECT count(*) FROM effects", 22)


async def test_a_relay_that_was_frozen_over_the_loss_does_not_call_its_events_published(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its events went into the stream that was lost; meanwhile another relay has found the loss."""
    relay = narrow(world, "one", stream_size_bytes_max=64 * MIB)
    await world.add(Counted(name="first", amount=1))
    assert await relay.publish_batch() == (1, 1)
    await world.add(Counted(name="small", amount=2))
    publish = Relay._publish

    async def publish_and_freeze(*args: Any) -> Any:
        answer = await publish(*args)
        await world.bus.jetstream.delete_stream("PROBE")
        await Relay(world.pool, world.bus, world.outbox, clock=SystemClock())._keeper.look("PROBE")
        assert await world.pool.fetchval("SELECT epoch FROM streams") == 2
        return answer

    with monkeypatch.context() as frozen:
        frozen.setattr(Relay, "_publish", publish_and_freeze)
        await relay.publish_batch()
    assert await world.pool.fetchval(WAITING) == 2
    world.spawn(relay.run)
    world.spawn(reader(world, "one").run)
    await world.until("SELECT count(*) FROM effects", 2)


async def test_a_stream_s_limits_retention_and_replicas_are_the_settings(world: World) -> None:
    narrow(world, "one")
    await world.bus.ensure_stream("PROBE")
    config = (await world.bus.jetstream.stream_info("PROBE")).config
    assert (config.num_replicas, config.retention, config.discard) == (1, "limits", api.DiscardPolicy.NEW)
    await world.bus.ensure_stream("ELSEWHERE")
    assert (await world.bus.jetstream.stream_info("ELSEWHERE")).config.discard == api.DiscardPolicy.OLD
    with pytest.raises(NotFoundError):
        await world.bus.jetstream.consumer_info("PROBE", "two")


async def test_copies_in_a_cluster_are_asked_for(world: World) -> None:
    """One server alone cannot keep three copies and says so: the setting reaches it, for streams new and old."""
    narrow(world, "one", stream_replicas=3)
    with pytest.raises(ServerError, match="replicas"):
        await world.bus.ensure_stream("PROBE")
    narrow(world, "one")
    await world.bus.ensure_stream("PROBE")
    narrow(world, "one", stream_replicas=3)
    await world.bus.recover()
    with capture_logs() as logs:
        await world.bus.ensure_stream("PROBE")
    assert "replicas" in next(entry["error"] for entry in logs if entry["event"] == "stream_settings_refused")
