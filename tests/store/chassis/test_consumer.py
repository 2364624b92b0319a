"""The way of an event from a transaction to its effect, on real servers: once, whatever happens on the way."""

import asyncio
import random
from typing import Any

import asyncpg
import pytest
from nats.aio.msg import Msg

from chassis.bus.consumer import Consumer
from chassis.bus.dead_letters import replay
from chassis.bus.durable_reader import DurableReader
from chassis.bus.envelope import EventInfo
from chassis.bus.relay import Relay
from chassis.clock import SystemClock
from chassis.db.pool import Connection
from chassis.errors import DataLoss, FailedPrecondition, Unavailable
from chassis.telemetry.trace import current_trace_id, span
from tests.harness.polling import eventually
from tests.harness.servers import NatsServer, PostgresServer
from tests.store.chassis.world import Counted, Ignored, Newer, World

EFFECTS = "SELECT count(*) FROM effects"


async def _record(connection: Connection, message: Any, event: EventInfo) -> None:
    await connection.execute("INSERT INTO effects (name, amount) VALUES ($1, $2)", message.name, message.amount)


def _consumer(world: World, handler=_record) -> Consumer:
    return Consumer(world.pool, world.bus, "prober", {Counted: handler}, clock=SystemClock())


def _relay(world: World) -> Relay:
    return Relay(world.pool, world.bus, world.outbox, clock=SystemClock())


async def _idle(world: World) -> None:
    """Waits until the bus has nothing left to deliver to the consumer."""

    async def left() -> int:
        info = await world.bus.jetstream.consumer_info("PROBE", "prober")
        return (info.num_pending or 0) + (info.num_ack_pending or 0)

    await eventually(left, lambda count: count == 0)


async def test_everything_twice_and_shuffled_has_its_effect_once(world: World) -> None:
    for number in range(100):
        await world.add(Counted(name=f"n{number}", amount=number), key=str(number))
    rows = await world.pool.fetch("SELECT subject, payload, headers FROM outbox")
    copies = [row for row in rows for _ in range(2)]
    random.Random(7).shuffle(copies)
    await world.bus.ensure_stream("PROBE")
    for row in copies:  # no Nats-Msg-Id: the bus's own deduplication must not be what makes this pass
        await world.bus.jetstream.publish(row["subject"], row["payload"], headers=row["headers"])
    world.spawn(_relay(world).run)
    world.spawn(_consumer(world).run)
    await world.until(EFFECTS, 100)
    await _idle(world)
    assert await world.pool.fetchval("SELECT sum(amount) FROM effects") == sum(range(100))
    assert await world.pool.fetchval("SELECT count(*) FROM inbox") == 100


async def test_two_consumers_of_one_name_share_the_work(world: World) -> None:
    world.spawn(_relay(world).run)
    for _ in range(2):
        world.spawn(_consumer(world).run)
    for number in range(200):
        await world.add(Counted(name=f"n{number}", amount=1))
    await world.until(EFFECTS, 200)
    await _idle(world)
    assert await world.pool.fetchval(EFFECTS) == 200


async def test_a_consumer_without_events_keeps_its_subscription(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull that its reader has left takes the next event with it,
    which then comes only after the acknowledgement time."""
    begun = fetched = 0
    often = asyncio.Event()
    subscribe, fetch = DurableReader._subscribe, DurableReader._fetch

    async def count(reader: DurableReader, stream: str) -> object:
        nonlocal begun
        begun += 1
        return await subscribe(reader, stream)

    async def count_fetches(reader: DurableReader, subscription: Any) -> list[Msg]:
        nonlocal fetched
        fetched += 1
        if fetched > 20:
            often.set()
        return await fetch(reader, subscription)

    monkeypatch.setattr(DurableReader, "_subscribe", count)
    monkeypatch.setattr(DurableReader, "_fetch", count_fetches)
    world.bus.settings = world.settings.model_copy(update={"consumer_fetch_wait_s": 0.05, "publish_timeout_s": 20.0})
    world.spawn(_consumer(world).run)
    await asyncio.wait_for(often.wait(), 60)
    assert begun == 1


async def test_crash_between_effect_and_ack(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = 0
    answer = Msg.ack

    async def lose_the_first_answers(message: Msg) -> None:
        nonlocal lost
        lost += 1
        if lost > 5:
            await answer(message)

    monkeypatch.setattr(Msg, "ack", lose_the_first_answers)
    world.bus.settings = world.settings.model_copy(update={"consumer_ack_wait_s": 1.0})
    world.spawn(_relay(world).run)
    world.spawn(_consumer(world).run)
    for number in range(5):
        await world.add(Counted(name=str(number)))
    await world.until(EFFECTS, 5)
    await _idle(world)
    assert lost >= 10, "each event came again"
    assert await world.pool.fetchval(EFFECTS) == 5


async def test_failed_handler_leaves_nothing_and_is_tried_again(world: World) -> None:
    attempts = 0

    async def fail_once(connection: Connection, message: Any, event: EventInfo) -> None:
        nonlocal attempts
        attempts += 1
        await _record(connection, message, event)
        if attempts == 1:
            raise FailedPrecondition("STATE_CONFLICT", "the earlier event is not here yet")

    world.spawn(_relay(world).run)
    world.spawn(_consumer(world, fail_once).run)
    await world.add(Counted(name="a"))
    await world.until("SELECT count(*) FROM inbox", 1)
    assert attempts == 2
    assert await world.pool.fetchval(EFFECTS) == 1
    assert await world.pool.fetchval("SELECT count(*) FROM handler_failures") == 0


async def test_an_event_on_the_subject_of_another_is_set_aside_and_stays_so(world: World) -> None:
    """Whoever may publish `probe.ignored` says itself what its event is: also that it were one of `probe.counted`."""
    consumer = Consumer(world.pool, world.bus, "prober", {Counted: _record}, clock=SystemClock(), families=("probe",))
    world.spawn(consumer.run)
    await world.add(Counted(name="forged", amount=3))
    row = await world.pool.fetchrow("SELECT id, payload, headers FROM outbox")
    assert row is not None
    await world.bus.ensure_stream("PROBE")
    await world.bus.jetstream.publish("probe.ignored", row["payload"], headers=row["headers"])
    await world.until("SELECT count(*) FROM dead_letters WHERE reason = 'EVENT_INVALID'", 1)
    assert not (await replay(world.pool, consumer, row["id"])).done
    assert await world.pool.fetchval(EFFECTS) == 0


async def test_permanent_error_is_set_aside_at_once(world: World) -> None:
    attempts = 0

    async def refuse(connection: Connection, message: Any, event: EventInfo) -> None:
        nonlocal attempts
        attempts += 1
        raise DataLoss("DATA_CORRUPT", "the digest is wrong")

    world.spawn(_relay(world).run)
    world.spawn(_consumer(world, refuse).run)
    await world.add(Counted(name="a", amount=3))
    await world.until("SELECT count(*) FROM dead_letters", 1)
    await _idle(world)
    row = await world.pool.fetchrow("SELECT subject, payload, headers, reason, error, failures FROM dead_letters")
    assert row is not None
    assert row["subject"] == "probe.counted"
    assert Counted.FromString(row["payload"]).amount == 3
    assert row["headers"]["ce-type"] == "chassis_test.Counted"
    assert row["reason"] == "DATA_CORRUPT"
    assert "the digest is wrong" in row["error"]
    assert attempts == row["failures"] == 1


async def test_defect_is_set_aside_after_the_limit(world: World) -> None:
    attempts = 0

    async def break_down(connection: Connection, message: Any, event: EventInfo) -> None:
        nonlocal attempts
        attempts += 1
        raise ZeroDivisionError("a defect")

    world.spawn(_relay(world).run)
    world.spawn(_consumer(world, break_down).run)
    await world.add(Counted(name="a"))
    await world.until("SELECT count(*) FROM dead_letters WHERE reason = 'INTERNAL' AND failures = 3", 1)
    await _idle(world)
    assert attempts == world.settings.consumer_failures_max == 3


async def test_dependency_that_is_away_never_kills_an_event(world: World) -> None:
    attempts = 0

    async def wait_for_peer(connection: Connection, message: Any, event: EventInfo) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= 6:
            failure = Unavailable("DEPENDENCY_UNAVAILABLE", "away")
            raise failure if attempts % 2 else asyncpg.ConnectionDoesNotExistError("connection was closed")
        await _record(connection, message, event)

    world.spawn(_relay(world).run)
    world.spawn(_consumer(world, wait_for_peer).run)
    await world.add(Counted(name="a"))
    await world.until(EFFECTS, 1)
    assert attempts == 7
    assert await world.pool.fetchval("SELECT count(*) FROM dead_letters") == 0


async def test_unreadable_events_are_set_aside_and_unknown_ones_passed(world: World) -> None:
    await world.bus.ensure_stream("PROBE")
    good = {"ce-id": "6f1f8a54-0000-4000-8000-000000000001", "ce-time": "2031-01-01T00:00:00+00:00"}
    counted = {"ce-type": "chassis_test.Counted"}
    publish = world.bus.jetstream.publish
    await publish("probe.counted", b"\xff\xff", headers={**good, **counted})
    await publish("probe.counted", b"", headers=counted)
    await publish("probe.counted", b"", headers={**good, **counted, "ce-id": "no uuid", "ce-time": "yesterday"})
    await publish("probe.counted", b"")
    world.spawn(_relay(world).run)
    world.spawn(_consumer(world).run)
    await world.add(Newer(name="from the future"))
    await world.add(Ignored(name="not for us"))
    # A field that this release does not know.
    extended = Counted(name="known", amount=5).SerializeToString() + b"\xa2\x06\x03new"
    await publish("probe.counted", extended, headers={**good, **counted, "ce-id": str(world.outbox._ids.uuid())})
    await world.until("SELECT count(*) FROM dead_letters WHERE reason = 'EVENT_INVALID'", 4)
    await world.until("SELECT amount FROM effects WHERE name = 'known'", 5)
    await _idle(world)
    assert await world.pool.fetchval(EFFECTS) == 1
    assert await world.pool.fetchval("SELECT count(*) FROM dead_letters") == 4


async def test_in_a_family_that_is_handled_whole_unknown_events_wait_for_a_version_that_knows_them(
    world: World,
) -> None:
    await world.add(Ignored(name="from the future"))
    await world.add(Counted(name="known", amount=1))
    world.spawn(_relay(world).run)
    handlers = {Counted: _record}
    world.spawn(Consumer(world.pool, world.bus, "prober", handlers, clock=SystemClock(), families=("probe",)).run)
    await world.until("SELECT count(*) FROM dead_letters", 1)
    await world.until(EFFECTS, 1)
    letter = await world.pool.fetchrow("SELECT event_id, reason, error FROM dead_letters")
    assert letter is not None
    assert letter["reason"] == "EVENT_INVALID"
    assert "handles no event of type" in letter["error"]
    newer = Consumer(world.pool, world.bus, "prober", {**handlers, Ignored: _note}, clock=SystemClock())
    assert (await replay(world.pool, newer, letter["event_id"])).done
    assert await world.pool.fetchval("SELECT count(*) FROM effects WHERE name = 'from the future'") == 1


async def _note(connection: Connection, message: Any, event: EventInfo) -> None:
    await connection.execute("INSERT INTO effects (name, amount) VALUES ($1, 0)", message.name)


async def test_trace_goes_on_with_the_event(world: World) -> None:
    traces: list[str] = []

    async def note(connection: Connection, message: Any, event: EventInfo) -> None:
        traces.append(current_trace_id())

    world.spawn(_relay(world).run)
    world.spawn(_consumer(world, note).run)
    with span("a call"):
        caused_by = current_trace_id()
        await world.add(Counted(name="a"))
    await world.until("SELECT count(*) FROM inbox", 1)
    assert traces == [caused_by]


async def test_stop_finishes_the_events_in_hand(world: World) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(connection: Connection, message: Any, event: EventInfo) -> None:
        begun.set()
        await go_on.wait()
        await _record(connection, message, event)

    world.spawn(_relay(world).run)
    consumer = _consumer(world, slow)
    running = world.spawn(consumer.run)
    await world.add(Counted(name="a"))
    await begun.wait()
    stopping = asyncio.create_task(consumer.stop())
    # A stop that does not wait would be over by now; one that waits tells nothing.
    await asyncio.sleep(0.05)
    assert not stopping.done()
    go_on.set()
    await asyncio.wait_for(stopping, timeout=30)
    assert running.done()
    assert await world.pool.fetchval(EFFECTS) == 1


async def test_nats_killed_mid_stream(world: World, nats_server: NatsServer) -> None:
    """Earns its seconds: publishing and consuming go on by themselves after kill -9, and nothing is lost or doubled."""
    world.spawn(_relay(world).run)
    world.spawn(_consumer(world).run)
    for number in range(300):
        await world.add(Counted(name=f"n{number}", amount=1))
        if number == 100:
            await nats_server.kill()
        if number == 200:
            await nats_server.start()
    await world.until(EFFECTS, 300)
    await _idle(world)
    assert await world.pool.fetchval("SELECT count(DISTINCT name) FROM effects") == 300
    assert await world.pool.fetchval(EFFECTS) == 300


async def test_nats_back_with_an_empty_disk(world: World, nats_server: NatsServer) -> None:
    """The bus is never the only copy of what waits: streams and readers are made again and events flow."""
    world.spawn(_relay(world).run)
    world.spawn(_consumer(world).run)
    await world.add(Counted(name="before"))
    await world.until(EFFECTS, 1)
    await world.bus.jetstream.delete_stream("PROBE")
    await world.add(Counted(name="after"))
    await world.until(EFFECTS, 2)


async def test_postgres_killed_mid_stream(world: World, postgres: PostgresServer) -> None:
    """Earns its seconds: events that meet a dead database are handled later and none becomes a dead letter."""
    for number in range(300):
        await world.add(Counted(name=f"n{number}", amount=1))
    world.spawn(_relay(world).run)
    world.spawn(_consumer(world).run)
    await world.until("SELECT count(*) > 20 FROM effects", True)
    await postgres.kill()
    # The database is away for a while: deliveries fail meanwhile, and the consumer tells nobody.
    await asyncio.sleep(0.5)
    await postgres.start()
    await world.until(EFFECTS, 300)
    await _idle(world)
    assert await world.pool.fetchval("SELECT count(DISTINCT name) FROM effects") == 300
    assert await world.pool.fetchval("SELECT count(*) FROM dead_letters") == 0


async def test_a_reader_is_drained_when_it_has_handled_all_that_was_there(world: World) -> None:
    """An event that waits for its next try is still to come, and a stream that goes on does not hide it."""
    gate = asyncio.Event()

    async def handler(connection: Connection, message: Any, event: EventInfo) -> None:
        if message.name == "held" and not gate.is_set():
            raise Unavailable("DEPENDENCY_UNAVAILABLE", "away")
        await _record(connection, message, event)

    consumer = _consumer(world, handler)
    assert not await consumer.is_drained(), "there is no reader yet"
    world.spawn(_relay(world).run)
    world.spawn(consumer.run)
    await world.add(Counted(name="held", amount=1))
    await world.add(Counted(name="free", amount=1))
    await world.until(EFFECTS, 1)
    assert not await consumer.is_drained()
    gate.set()
    assert await eventually(consumer.is_drained, lambda drained: drained)
    assert await world.pool.fetchval(EFFECTS) == 2
