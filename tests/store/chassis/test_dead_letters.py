"""Dead letters on real servers: announced with the transaction that keeps them, listed in pages, run again once."""

import asyncio
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.message import Message

from chassis.bus import dead_letters
from chassis.bus.consumer import Consumer, Handler
from chassis.bus.dead_letters import (
    DeadLetter,
    Replayed,
    discard,
    is_discarded,
    list_dead_letters,
    names_set_aside,
    replay,
    set_aside,
)
from chassis.bus.envelope import EventInfo
from chassis.bus.relay import Relay
from chassis.clock import SystemClock
from chassis.db.pool import Connection, transaction
from chassis.errors import InvalidArgument, NotFound, Unavailable
from finemesh.events.v1.dead_letter_events_pb2 import EventSetAside
from tests.store.chassis.world import Counted, World

LETTERS = "SELECT count(*) FROM dead_letters"
EFFECTS = "SELECT count(*) FROM effects"
EVENT = EventInfo(
    id=uuid.UUID("6f1f8a54-0000-4000-8000-000000000009"),
    type="chassis_test.Counted",
    source="meter",
    subject="probes/1",
    time=datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC),
    deliveries=1,
)


async def record(connection: Connection, message: Any, event: EventInfo) -> None:
    await connection.execute("INSERT INTO effects (name, amount) VALUES ($1, $2)", message.name, message.amount)


async def refuse(connection: Connection, message: Any, event: EventInfo) -> None:
    await record(connection, message, event)
    raise InvalidArgument("EVENT_INVALID", f"{message.amount} cannot be")


def consumer_of(world: World, handler: Handler) -> Consumer:
    return Consumer(world.pool, world.bus, "prober", {Counted: handler}, clock=SystemClock(), outbox=world.outbox)


async def put_aside(world: World, message: Message, *, event: EventInfo = EVENT, error: str = "bad") -> None:
    async with transaction(world.pool) as connection:
        await set_aside(
            connection,
            consumer="prober",
            event=event,
            message=message,
            reason="EVENT_INVALID",
            error=error,
            outbox=world.outbox,
        )


async def letters(world: World, after: DeadLetter | None = None, row_max: int = 100) -> list[DeadLetter]:
    position = (after.create_time, after.event_id) if after else None
    async with world.pool.acquire() as connection:
        return await list_dead_letters(connection, "prober", after=position, row_max=row_max)


async def announcements(world: World) -> list[EventSetAside]:
    rows = await world.pool.fetch(
        "SELECT payload FROM outbox WHERE subject = 'deadletter.event_set_aside' ORDER BY created_at"
    )
    return [EventSetAside.FromString(row["payload"]) for row in rows]


async def test_what_a_consumer_gives_up_is_in_the_stream_of_dead_letters(world: World) -> None:
    world.spawn(Relay(world.pool, world.bus, world.outbox, clock=SystemClock()).run)
    world.spawn(consumer_of(world, refuse).run)
    await world.add(Counted(name="a", amount=3))
    await world.until("SELECT count(*) FROM outbox WHERE subject LIKE 'deadletter.%' AND published_at IS NOT NULL", 1)
    stream = await world.bus.jetstream.stream_info("DEADLETTER")
    assert stream.state.messages == 1
    published = await world.bus.jetstream.get_msg("DEADLETTER", seq=1)
    assert published.subject == "deadletter.event_set_aside"
    told = EventSetAside.FromString(published.data or b"")
    (kept,) = await letters(world)
    assert (told.consumer, told.event_id) == ("prober", str(kept.event_id))
    assert (told.event_subject, told.event_type) == ("probe.counted", "chassis_test.Counted")
    assert (told.reason, told.error) == ("EVENT_INVALID", kept.error)
    assert "3 cannot be" in told.error
    assert Counted.FromString(told.payload) == Counted(name="a", amount=3)
    assert told.event_time.ToDatetime(UTC) == kept.create_time
    assert await world.pool.fetchval(EFFECTS) == 0


async def test_the_announcement_leaves_out_what_does_not_fit(world: World) -> None:
    size_max = world.settings.event_size_bytes_max
    large = Counted(name="x" * (size_max - 100))
    await put_aside(world, large, error="w" * 5000)
    world.outbox.size_bytes_max = 1024
    hostile = EventInfo(id=uuid.uuid4(), type="t", source="s", subject="s", time=EVENT.time, deliveries=1)
    await put_aside(world, Counted(name="y" * 2000), event=hostile, error="é" * 5000)
    first, second = await announcements(world)
    assert (first.payload, len(first.error)) == (b"", 2000)
    assert (second.payload, second.error) == (b"", "é" * 64)
    assert [Counted.FromString(kept.payload).name[0] for kept in await letters(world)] == ["x", "y"]


async def test_texts_that_no_column_holds_are_kept_readable(world: World) -> None:
    async with transaction(world.pool) as connection:
        await dead_letters.bury(
            connection,
            world.outbox,
            consumer="prober",
            event_id=EVENT.id,
            subject="probe.counted",
            payload=b"\0\xff",
            headers={"ce-type": "a\0b\udcff", "odd\0": "x"},
            reason="EVENT_INVALID",
            error="zero \0 and half \udcff",
            failures=1,
        )
    (kept,) = await letters(world)
    assert (kept.payload, kept.headers, kept.error) == (
        b"\0\xff",
        {"ce-type": "ab?", "odd": "x"},
        "zero  and half ?",
    )
    assert (await announcements(world))[0].event_type == "ab?"


async def test_a_part_is_kept_once_and_another_part_beside_it(world: World) -> None:
    for _ in range(2):
        await put_aside(world, Counted(name="bad"))
    await put_aside(world, Counted(name="worse"))
    kept = await letters(world)
    assert [Counted.FromString(letter.payload).name for letter in kept] == ["bad", "worse"]
    assert len({letter.event_id for letter in kept} | {EVENT.id}) == 3
    assert len(await announcements(world)) == 2
    assert await world.pool.fetchval("SELECT count(*) FROM inbox") == 2


async def test_a_part_that_is_rolled_back_was_never_set_aside(world: World) -> None:
    with pytest.raises(ZeroDivisionError):
        async with transaction(world.pool) as connection:
            await set_aside(
                connection,
                consumer="prober",
                event=EVENT,
                message=Counted(name="bad"),
                reason="EVENT_INVALID",
                error="bad",
                outbox=world.outbox,
            )
            raise ZeroDivisionError
    assert await world.pool.fetchval(LETTERS) == 0
    assert await announcements(world) == []


async def test_pages_hold_every_letter_once_oldest_first(world: World) -> None:
    for number in range(7):
        await put_aside(world, Counted(amount=number + 1))
    await world.pool.execute("UPDATE dead_letters SET created_at = '2031-01-01' WHERE failures = 1 AND reason <> ''")
    seen: list[DeadLetter] = []
    while page := await letters(world, seen[-1] if seen else None, row_max=3):
        seen += page
    assert len(seen) == 7
    assert sorted(Counted.FromString(letter.payload).amount for letter in seen) == [1, 2, 3, 4, 5, 6, 7]
    assert [letter.event_id for letter in seen] == sorted(letter.event_id for letter in seen)


async def test_a_replay_has_the_effect_once_and_is_remembered(world: World) -> None:
    events: list[EventInfo] = []

    async def note(connection: Connection, message: Any, event: EventInfo) -> None:
        events.append(event)
        await record(connection, message, event)

    await put_aside(world, Counted(name="late", amount=5))
    (kept,) = await letters(world)
    consumer = consumer_of(world, note)
    assert await replay(world.pool, consumer, kept.event_id) == Replayed(done=True)
    assert await world.pool.fetchval("SELECT sum(amount) FROM effects") == 5
    (event,) = events
    assert (event.id, event.source, event.subject, event.time) == (kept.event_id, "meter", "probes/1", EVENT.time)
    assert await letters(world) == []
    assert await world.pool.fetchval("SELECT count(*) FROM inbox WHERE event_id = $1", kept.event_id) == 1
    with pytest.raises(NotFound) as missing:
        await replay(world.pool, consumer, kept.event_id)
    assert missing.value.reason == "NOT_FOUND"
    assert await world.pool.fetchval(EFFECTS) == 1


async def test_two_replays_at_once_have_one_effect(world: World) -> None:
    begun = asyncio.Event()

    async def slow(connection: Connection, message: Any, event: EventInfo) -> None:
        begun.set()
        # Long enough for the others to come to the row that this one has locked.
        await asyncio.sleep(0.1)
        await record(connection, message, event)

    await put_aside(world, Counted(name="a"))
    (kept,) = await letters(world)
    outcomes = await asyncio.gather(
        *(replay(world.pool, consumer_of(world, slow), kept.event_id) for _ in range(3)), return_exceptions=True
    )
    assert outcomes.count(Replayed(done=True)) == 1
    assert [type(outcome) for outcome in outcomes].count(NotFound) == 2
    assert await world.pool.fetchval(EFFECTS) == 1


async def test_a_replay_that_fails_keeps_the_letter_with_the_new_error(world: World) -> None:
    await put_aside(world, Counted(name="a", amount=4))
    (before,) = await letters(world)
    outcome = await replay(world.pool, consumer_of(world, refuse), before.event_id)
    assert not outcome.done
    assert "4 cannot be" in outcome.error
    (after,) = await letters(world)
    assert (after.error, after.failures, after.reason) == (outcome.error, 2, "EVENT_INVALID")
    assert (after.payload, after.headers, after.create_time) == (before.payload, before.headers, before.create_time)
    assert await world.pool.fetchval(EFFECTS) == 0


async def test_a_replay_while_something_is_away_changes_nothing(world: World) -> None:
    async def wait_for_peer(connection: Connection, message: Any, event: EventInfo) -> None:
        raise Unavailable("DEPENDENCY_UNAVAILABLE", "away")

    await put_aside(world, Counted(name="a"))
    before = await letters(world)
    with pytest.raises(Unavailable):
        await replay(world.pool, consumer_of(world, wait_for_peer), before[0].event_id)
    assert await letters(world) == before


async def test_a_letter_that_nobody_can_read_stays(world: World) -> None:
    for payload, headers, problem in (
        (b"\xff\xff", {"ce-type": "chassis_test.Counted", "ce-id": str(EVENT.id), "ce-time": "2031-01-01"}, "Decode"),
        (b"", {"ce-type": "chassis_test.Counted"}, "headers are not usable"),
        (b"", {"ce-type": "other.Type", "ce-id": str(EVENT.id), "ce-time": "2031-01-01"}, "handles no event of type"),
    ):
        async with transaction(world.pool) as connection:
            await connection.execute("DELETE FROM dead_letters")
            await dead_letters.bury(
                connection,
                None,
                consumer="prober",
                event_id=EVENT.id,
                subject="probe.counted",
                payload=payload,
                headers=headers,
                reason="EVENT_INVALID",
                error="first",
                failures=1,
            )
        outcome = await replay(world.pool, consumer_of(world, record), EVENT.id)
        assert not outcome.done
        assert problem in outcome.error
        assert (await letters(world))[0].error == outcome.error
    assert await world.pool.fetchval(EFFECTS) == 0


async def test_a_replay_that_sets_a_part_aside_again_says_so(world: World) -> None:
    async def half(connection: Connection, message: Any, event: EventInfo) -> None:
        await record(connection, message, event)
        if message.amount > 1:
            await set_aside(
                connection,
                consumer="prober",
                event=event,
                message=Counted(name="rest", amount=message.amount // 2),
                reason="EVENT_INVALID",
                error=f"half of {message.amount}",
            )

    consumer = consumer_of(world, half)
    await put_aside(world, Counted(name="whole", amount=2))
    (whole,) = await letters(world)
    assert await replay(world.pool, consumer, whole.event_id) == Replayed(done=False, error="half of 2")
    (rest,) = await letters(world)
    assert Counted.FromString(rest.payload) == Counted(name="rest", amount=1)
    assert await replay(world.pool, consumer, rest.event_id) == Replayed(done=True)
    assert await world.pool.fetchval("SELECT sum(amount) FROM effects") == 3


async def test_people_see_what_can_be_read(world: World) -> None:
    consumer = consumer_of(world, record)
    assert consumer.read("chassis_test.Counted", Counted(name="a").SerializeToString()) == Counted(name="a")
    assert consumer.read("chassis_test.Counted", b"\xff\xff") is None
    assert consumer.read("unknown.Type", b"") is None


async def test_a_discarded_one_is_kept_with_its_reason_and_waits_for_nobody(world: World) -> None:
    await put_aside(world, Counted(name="a", amount=3))
    await put_aside(world, Counted(name="b", amount=4))
    first, second = await letters(world)
    async with transaction(world.pool) as connection:
        await discard(connection, "prober", first.event_id, by="key_1", why="a test's")
        # The other one of the same resource still waits.
        assert await names_set_aside(connection, "prober", ["probes/1"]) == {"probes/1"}
        await discard(connection, "prober", second.event_id, by="key_1", why="so is this")
        assert await names_set_aside(connection, "prober", ["probes/1"]) == set()
        assert await is_discarded(connection, "prober", name="probes/1", subject=first.subject)
        assert not await is_discarded(connection, "prober", name="probes/2", subject=first.subject)
        assert not await is_discarded(connection, "prober", name="probes/1", subject="probes.other")
    assert await letters(world) == []
    async with world.pool.acquire() as connection:
        kept = await list_dead_letters(connection, "prober", after=None, row_max=10, discarded=True)
    assert [(letter.event_id, letter.discarded_by, letter.discard_reason) for letter in kept] == [
        (first.event_id, "key_1", "a test's"),
        (second.event_id, "key_1", "so is this"),
    ]
    assert all(letter.discard_time is not None for letter in kept)
    # Neither a replay nor a second discard finds it, and set aside again it stays discarded.
    with pytest.raises(NotFound):
        await replay(world.pool, consumer_of(world, record), first.event_id)
    async with transaction(world.pool) as connection:
        with pytest.raises(NotFound):
            await discard(connection, "prober", first.event_id, by="key_2", why="again")
    await put_aside(world, Counted(name="a", amount=3))
    assert await letters(world) == []
