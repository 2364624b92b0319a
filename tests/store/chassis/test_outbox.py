"""The outbox and its relays on real servers: what is committed is published, whoever dies in between."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import pytest
import pytest_asyncio

from chassis.bus.connection import connect
from chassis.bus.outbox import Outbox, event_id_of, prune
from chassis.bus.relay import Relay
from chassis.clock import ManualClock, SystemClock
from chassis.db.pool import Pool, open_pool, transaction
from chassis.errors import ResourceExhausted
from chassis.ids import SeededIds
from tests.harness.parties import as_another
from tests.store.chassis.world import Counted, Elsewhere, World

WAITING = "SELECT count(*) FROM outbox WHERE published_at IS NULL"


async def _stream_size(world: World) -> int:
    info = await world.bus.jetstream.stream_info("PROBE")
    return int(info.state.messages)


async def test_headers_and_deterministic_ids(world: World) -> None:
    clock = ManualClock(datetime(2031, 5, 6, tzinfo=UTC))
    outbox = Outbox(world.settings, clock=clock, ids=SeededIds(1))
    async with transaction(world.pool) as connection:
        first = await outbox.add(connection, Counted(name="a"), subject_name="probes/1", key="job/1-20")
        again = await outbox.add(connection, Counted(name="a"), subject_name="probes/1", key="job/1-20")
        other = await outbox.add(connection, Counted(name="a"), subject_name="probes/1")
    assert first == again == event_id_of("prober", "chassis_test.Counted", "job/1-20")
    assert other != first
    assert await world.pool.fetchval("SELECT count(*) FROM outbox") == 2
    headers = await world.pool.fetchval("SELECT headers FROM outbox WHERE id = $1", first)
    assert headers["ce-type"] == "chassis_test.Counted"
    assert headers["ce-source"] == "prober"
    assert headers["ce-subject"] == "probes/1"
    assert headers["ce-time"] == "2031-05-06T00:00:00+00:00"
    assert headers["ce-id"] == str(first)


async def test_rolled_back_change_has_no_event(world: World) -> None:
    with pytest.raises(RuntimeError):
        async with transaction(world.pool) as connection:
            await world.outbox.add(connection, Counted(name="a"), subject_name="probes/1")
            raise RuntimeError("the change failed")
    assert await world.pool.fetchval("SELECT count(*) FROM outbox") == 0


async def test_oversized_event_is_refused_before_it_is_stored(world: World) -> None:
    with pytest.raises(ResourceExhausted, match="SIZE_LIMIT"):
        await world.add(Counted(name="x" * (world.settings.event_size_bytes_max + 1)))
    assert await world.pool.fetchval("SELECT count(*) FROM outbox") == 0


async def test_two_relays_share_one_outbox(world: World) -> None:
    for number in range(300):
        await world.add(Counted(name=str(number)))
    for _ in range(2):
        world.spawn(Relay(world.pool, world.bus, world.outbox, clock=SystemClock()).run)
    await world.until(WAITING, 0)
    assert await _stream_size(world) == 300


def told_to_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when a relay has found nothing and waits for more."""
    waiting, wait = asyncio.Event(), world.outbox.wait

    async def tell(timeout_s: float) -> None:
        waiting.set()
        await wait(timeout_s)

    monkeypatch.setattr(world.outbox, "wait", tell)
    return waiting


async def test_wake_publishes_without_waiting_for_the_poll(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = world.settings.model_copy(update={"outbox_poll_s": 3600.0})
    world.bus.settings = slow
    waiting = told_to_wait(world, monkeypatch)
    world.spawn(Relay(world.pool, world.bus, world.outbox, clock=SystemClock()).run)
    await waiting.wait()
    await world.add(Counted(name="a"))
    await world.until(WAITING, 0)


async def test_event_of_a_slower_transaction_is_not_skipped(world: World) -> None:
    """The first row commits last; a relay that remembered how far it had read would lose it."""
    world.spawn(Relay(world.pool, world.bus, world.outbox, clock=SystemClock()).run)
    async with transaction(world.pool) as connection:
        await world.outbox.add(connection, Counted(name="early"), subject_name="probes/1")
        await as_another(world.add(Counted(name="late")))
        await as_another(world.until("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL", 1))
    await world.until("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL", 2)
    assert await _stream_size(world) == 2


async def test_an_event_that_can_never_be_published_holds_up_no_other(world: World) -> None:
    """Larger than the server takes, or with a header that is no text."""
    bad = (
        "INSERT INTO outbox (id, subject, payload, headers, created_at)"
        " VALUES (gen_random_uuid(), 'probe.counted', $1, $2, now() - interval '1 hour')"
    )
    await world.pool.execute(bad, b"x" * 1_100_000, {"ce-id": "1"})
    await world.pool.execute(bad, b"x", {"ce-id": 5})
    await world.add(Counted(name="good"))
    await world.add(Elsewhere(name="good"))
    world.bus.settings = world.settings.model_copy(update={"outbox_lease_s": 3600.0})
    relay = Relay(world.pool, world.bus, world.outbox, clock=SystemClock())
    assert await relay.publish_batch() == (4, 2)
    await world.add(Counted(name="good, too"))
    assert await relay.publish_batch() == (1, 1), "the bad ones are left alone, and their stream is not"
    assert await _stream_size(world) == 2
    assert await world.pool.fetchval(WAITING) == 2
    # Tried again at the next look at all, in case that a new release or another server can.
    await world.pool.execute("UPDATE outbox SET claimed_until = now() - interval '1 ms'")
    assert await Relay(world.pool, world.bus, world.outbox, clock=SystemClock()).publish_batch() == (2, 0)


async def test_a_stream_that_fails_by_a_defect_holds_up_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = Relay(world.pool, world.bus, world.outbox, clock=SystemClock())
    honest = relay._keeper.look

    async def look(stream: str) -> bool:
        if stream == "ELSEWHERE":
            raise ZeroDivisionError
        return await honest(stream)

    monkeypatch.setattr(relay._keeper, "look", look)
    await world.add(Counted(name="good"))
    await world.add(Elsewhere(name="good"))
    assert await relay.publish_batch() == (2, 1)
    assert await _stream_size(world) == 1


async def test_crash_between_publish_and_mark_publishes_one_event_once(world: World) -> None:
    relay = Relay(world.pool, world.bus, world.outbox, clock=SystemClock())
    await world.add(Counted(name="a"))
    assert await relay.publish_batch() == (1, 1)
    # What the database shows after a relay died before it could mark the row.
    await world.pool.execute("UPDATE outbox SET published_at = NULL, claimed_until = now() + interval '1 hour'")
    assert await relay.publish_batch() == (0, 0), "the claim of the dead relay still holds"
    await world.pool.execute("UPDATE outbox SET claimed_until = now() - interval '1 ms'")
    assert await relay.publish_batch() == (1, 1)
    assert await _stream_size(world) == 1


async def test_stop_publishes_what_the_last_calls_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = Relay(world.pool, world.bus, world.outbox, clock=SystemClock())
    waiting = told_to_wait(world, monkeypatch)
    running = world.spawn(relay.run)
    await waiting.wait()
    await world.add(Counted(name="a"))
    await world.bus.close()
    assert running.done()
    assert await world.pool.fetchval(WAITING) == 0
    world.bus = await connect(world.settings)


async def test_prune_is_bounded_and_keeps_what_is_young_or_waiting(world: World) -> None:
    for number in range(5):
        await world.add(Counted(name=str(number)))
    await world.pool.execute(
        "UPDATE outbox SET published_at = now() - interval '8 days' WHERE id IN (SELECT id FROM outbox LIMIT 4)"
    )
    settings = world.settings.model_copy(update={"prune_batch_max": 3})
    async with transaction(world.pool) as connection:
        assert await prune(connection, settings) == 3
        assert await prune(connection, settings) == 1
        assert await prune(connection, settings) == 0
    assert await world.pool.fetchval(WAITING) == 1


async def test_pruning_goes_on_until_it_is_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bounded batch after the other, without the pause between prunings, while new events go out."""
    for number in range(20):
        await world.add(Counted(name=str(number)))
    await world.pool.execute("UPDATE outbox SET published_at = now() - interval '8 days'")
    old = {"consumer": "prober", "days": 31}
    await world.pool.execute(
        "INSERT INTO inbox (consumer, event_id, handled_at)"
        " SELECT $1, gen_random_uuid(), now() - make_interval(days => $2) FROM generate_series(1, 30)",
        *old.values(),
    )
    world.bus.settings = world.settings.model_copy(
        update={"prune_batch_max": 3, "prune_interval_s": 3600.0, "outbox_poll_s": 3600.0}
    )
    relay = Relay(world.pool, world.bus, world.outbox, clock=SystemClock())
    relay._prune_at = 0.0
    waiting = told_to_wait(world, monkeypatch)
    await world.add(Counted(name="new"))
    world.spawn(relay.run)
    async with asyncio.timeout(30):
        await waiting.wait()
    assert await world.pool.fetchval("SELECT count(*) FROM inbox") == 0
    assert await world.pool.fetchval("SELECT count(*) FROM outbox") == 1
    assert await world.pool.fetchval(WAITING) == 0


@pytest_asyncio.fixture(loop_scope="session")
async def lone_pool(world: World) -> AsyncIterator[Pool]:
    """One connection, so that what it did can be asked for."""
    pool = await open_pool(world.settings.model_copy(update={"pool_size_max": 1}))
    yield pool
    await pool.close()


async def entries_read(pool: Pool) -> int:
    """Entries that were read so far of the index by which events are claimed."""
    await pool.execute("SELECT pg_stat_force_next_flush()")
    found = await pool.fetchval("SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'outbox_waiting'")
    assert isinstance(found, int)
    return found


async def test_a_backup_does_not_make_claims_read_all_that_was_published(world: World, lone_pool: Pool) -> None:
    """While an old snapshot is held, VACUUM takes nothing out of the index of what waits."""
    backup = await asyncpg.connect(world.settings.database_url)
    await backup.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await backup.fetchval("SELECT count(*) FROM outbox")
    await world.pool.execute(
        "INSERT INTO outbox (id, subject, payload, headers, created_at)"
        " SELECT gen_random_uuid(), 'probe.counted', '', '{}', now() - interval '1 hour' FROM generate_series(1, 5000)"
    )
    await world.pool.execute("UPDATE outbox SET published_at = now()")
    relay = Relay(lone_pool, world.bus, world.outbox, clock=SystemClock())
    await relay.publish_batch()
    before = await entries_read(lone_pool)
    for number in range(3):
        await world.add(Counted(name=str(number)))
        assert await relay.publish_batch() == (1, 1)
    read = await entries_read(lone_pool) - before
    await backup.close()
    assert read < 500


async def test_an_event_that_became_visible_late_is_published_at_the_next_look_at_all(world: World) -> None:
    """Its time is that of its insert, however long the transaction took."""
    clock = ManualClock()
    relay = Relay(world.pool, world.bus, world.outbox, clock=clock)
    assert await relay.publish_batch() == (0, 0)
    await world.add(Counted(name="late"))
    await world.pool.execute("UPDATE outbox SET created_at = now() - interval '1 hour'")
    assert await relay.publish_batch() == (0, 0)
    clock.jump(world.settings.outbox_look_whole_s)
    assert await relay.publish_batch() == (1, 1)
