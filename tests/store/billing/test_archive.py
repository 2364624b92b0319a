"""The archive of usage events on a real bus and a real folder: written before events leave, found out when damaged, and
enough to book the same ledger again.
"""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.message import Message
from nats.aio.msg import Msg

from chassis.bus.connection import Bus, connect
from chassis.bus.consumer import Consumer
from chassis.bus.durables import ARCHIVE, ARCHIVE_ACK_WAIT_S
from chassis.bus.relay import Relay
from chassis.clock import ManualClock, SystemClock
from chassis.db.pool import transaction
from chassis.objects.object_store import PART_BYTES_MIN, ObjectStore
from services.billing.archive.archive_keeper import ArchiveKeeper
from services.billing.archive.archive_watch import ArchiveWatch
from services.billing.archive.archiver import Archiver
from services.billing.archive.republish import republish
from services.billing.audit.archive_audit import ArchiveAudit, ArchiveProgress
from services.billing.config import BillingSettings
from services.billing.events import DURABLE, FAMILIES, Events
from services.billing.limits import FactLimits
from tests.harness.endings import end_all
from tests.harness.polling import eventually
from tests.harness.servers import NatsServer, PostgresServer
from tests.store.billing.conftest import fresh_world
from tests.store.billing.world import NOW, USD, World, ended, evaluate, minute, served, train, whole_run


@dataclass(kw_only=True)
class Office:
    """A world whose events travel over the bus, with the archive's parts."""

    world: World
    settings: BillingSettings
    bus: Bus
    folder: Path
    objects: ObjectStore
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def archiver(self) -> Archiver:
        return Archiver(self.world.pool, self.bus, self.objects, self.settings, clock=SystemClock())

    def archive(self) -> asyncio.Task[None]:
        return self._spawn(self.archiver().run())

    def book(self) -> asyncio.Task[None]:
        handlers = Events(self.world.catalogue, FactLimits(), self.world.outbox, clock=self.world.clock).handlers
        consumer = Consumer(
            self.world.pool,
            self.bus,
            DURABLE,
            handlers,
            clock=SystemClock(),
            outbox=self.world.outbox,
            families=FAMILIES,
        )
        return self._spawn(consumer.run())

    def relay(self) -> asyncio.Task[None]:
        return self._spawn(Relay(self.world.pool, self.bus, self.world.outbox, clock=SystemClock()).run())

    def _spawn(self, run: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(run)
        self.tasks.append(task)
        return task

    async def publish(self, *messages: Message) -> None:
        async with transaction(self.world.pool) as connection:
            for message in messages:
                key = message.SerializeToString(deterministic=True).hex()
                await self.world.outbox.add(connection, message, subject_name="test", key=key)
        self.world.outbox.wake()

    async def until(self, query: str, expected: object) -> None:
        async def look() -> object:
            for task in self.tasks:
                if task.done() and not task.cancelled():
                    await task
            return await self.world.pool.fetchval(query)

        await eventually(look, lambda found: found == expected)

    async def verify(self, organization_id: str | None = None) -> ArchiveProgress:
        audit = ArchiveAudit(self.world.pool, self.bus, self.objects, self.settings, organization_id, consumer=DURABLE)
        async for _ in audit.run():
            pass
        return audit.progress

    async def everything_answered(self) -> None:
        async def left() -> int:
            infos = [await self.bus.jetstream.consumer_info(stream, ARCHIVE) for stream in ("USAGE", "TUNING")]
            return sum((info.num_pending or 0) + (info.num_ack_pending or 0) for info in infos)

        await eventually(left, lambda count: count == 0)

    def files(self) -> list[Path]:
        return sorted(self.folder.rglob("*.jsonl.gz"), key=lambda path: path.name)


@asynccontextmanager
async def opened(world: World, nats_server: NatsServer, folder: Path) -> AsyncIterator[Office]:
    settings = BillingSettings(
        nats_url=nats_server.url,
        artifacts_url=folder.as_uri(),
        archive_interval_s=0.1,
        archive_fetch_max=7,
        archive_file_events_max=10,
        outbox_poll_s=0.05,
        consumer_fetch_wait_s=0.1,
        archive_backoff_s_max=0.2,
        publish_timeout_s=2.0,
        consumer_backoff_s_min=0.01,
    )
    objects = ObjectStore(settings.artifacts_url, part_bytes=PART_BYTES_MIN, parts_in_flight_max=1)
    office = Office(world=world, settings=settings, bus=await connect(settings), folder=folder, objects=objects)
    yield office
    await end_all(office.tasks)
    for stream in await office.bus.jetstream.streams_info():
        await office.bus.jetstream.delete_stream(stream.config.name)
    await office.bus.client.close()


@pytest_asyncio.fixture(loop_scope="session")
async def office(world: World, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Office]:
    # What the archive begins with is of today.
    world.clock.jump((datetime.now(UTC) - NOW).total_seconds())
    async with opened(world, nats_server, tmp_path / "objects") as made:
        yield made


def story() -> list[Message]:
    """Two organizations: a completed job, a cancelled one, served calls and minutes; one call cannot be booked."""
    events = [*whole_run("a"), ended("a", "COMPLETED", 16), train("b", 0, 20), evaluate("b", 1)]
    events += [ended("b", "CANCELLED_RUNNING", 2), *(minute("b", number) for number in range(5))]
    events += [served("a", *((f"gen-{batch}-{call}", 1000, 10) for call in range(5))) for batch in range(4)]
    return [*events, served("a", ("gen-bad", -1, 1), ("gen-good", 1, 0))]


STORY = 16 + 1 + 2 + 1 + 5 + 4 + 1
# The part of an event that is set aside counts for itself.
BOOKED = "SELECT count(*) - 1 FROM inbox WHERE consumer = 'billing'"


class KilledError(Exception):
    """Ends an archiver at once, as `kill -9` does."""


def minute_now(number: int) -> Message:
    message: Any = minute("b", number)
    message.usage_time.GetCurrentTime()
    return message


async def prepare(world: World) -> None:
    for organization in ("a", "b"):
        await world.top_up(organization, 15 * USD)
        await world.hold(organization)


async def run_story(office: Office) -> None:
    await prepare(office.world)
    for part in (office.relay, office.book, office.archive):
        part()
    await office.publish(*story())
    await office.until(BOOKED, STORY)
    await office.everything_answered()


async def test_every_event_is_filed_whole_and_the_files_are_a_chain(office: Office) -> None:
    await run_story(office)
    lines: list[dict[str, Any]] = []
    before = "00" * 32
    rows = await office.world.pool.fetch("SELECT * FROM archive_files ORDER BY position")
    assert len(rows) == len(office.files()) >= 2
    for place, (row, path) in enumerate(zip(rows, office.files(), strict=True), start=1):
        header, *events = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        assert (row["position"], header["position"], header["previous_sha256"]) == (place, place, before)
        assert (row["event_count"], header["event_count"]) == (len(events), len(events)) and len(events) <= 17
        assert path.parent.name == header["first_time"][:10] == datetime.now(UTC).date().isoformat()
        before = row["sha256"].hex()
        lines += events
    wanted = "SELECT id FROM outbox WHERE subject LIKE 'usage.%' OR subject = 'tuning.job.ended'"
    published = {str(row["id"]) for row in await office.world.pool.fetch(wanted)}
    assert {line["headers"]["ce-id"] for line in lines} == published
    assert len(lines) == len(published) == STORY
    agreed = await office.verify()
    assert agreed.difference is None, agreed.difference
    assert (agreed.events, agreed.older_records, agreed.files) == (STORY, 0, len(rows))
    one = await office.verify("b")
    assert one.difference is None, one.difference
    assert not await office.world.pool.fetchval("SELECT count(*) FROM archive_writes")


async def test_the_archive_alone_books_the_same_ledger_byte_for_byte(
    office: Office, postgres: PostgresServer, nats_server: NatsServer
) -> None:
    await run_story(office)
    once = await office.world.dump()
    letters = "SELECT count(*) FROM dead_letters"
    assert await office.world.pool.fetchval(letters) == 1
    await end_all(office.tasks)
    # Another bus: this one has its events no more.
    for stream in await office.bus.jetstream.streams_info():
        await office.bus.jetstream.delete_stream(stream.config.name)
    await office.bus.recover()
    async with fresh_world(postgres) as other:
        other.clock = office.world.clock
        again = replace(office, world=other)
        await prepare(other)
        count = await republish(
            office.bus, office.objects, office.settings, since=datetime.min.replace(tzinfo=UTC), clock=SystemClock()
        )
        assert count == STORY
        booking = again.book()
        await again.until(BOOKED, STORY)
        assert await other.dump() == once
        assert await other.pool.fetchval(letters) == 1
        await end_all([booking])


async def test_a_crash_between_the_file_and_the_answer_loses_and_doubles_nothing(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the object was stored, and another time after the row was: the events come again to the next."""
    stored = ObjectStore.put_synced
    answered: list[Msg] = []
    # What nobody answered comes again after a second, not after five minutes.
    office.settings = office.settings.model_copy(update={"archive_ack_wait_s": 1.0})

    async def stored_and_dead(store: ObjectStore, key: str, content: bytes) -> None:
        await stored(store, key, content)
        raise KilledError

    async def dead(message: Msg) -> None:
        answered.append(message)
        raise KilledError

    await prepare(office.world)
    office.relay()
    office.book()
    await office.publish(*story())
    await office.until(BOOKED, STORY)
    for place, fault in ((ObjectStore, stored_and_dead), (Msg, dead)):
        with monkeypatch.context() as faulty:
            faulty.setattr(place, "put_synced" if place is ObjectStore else "ack", fault)
            with pytest.raises(ExceptionGroup, match="unhandled"):
                await office.archiver().run()
    assert answered
    assert (await office.verify()).difference is None, "what is not archived is read from the bus"
    office.archive()
    await office.everything_answered()
    agreed = await office.verify()
    assert agreed.difference is None, agreed.difference
    assert agreed.events > STORY, "those of the file whose answer was lost are in two"
    files = await office.world.pool.fetchval("SELECT count(*) FROM archive_files")
    assert len(office.files()) > files
    await office.world.pool.execute("UPDATE archive_writes SET write_time = now() - interval '2 hours'")
    keeper = ArchiveKeeper(office.world.pool, office.objects, office.settings, clock=SystemClock())
    assert not await keeper.keep()
    assert len(office.files()) == files
    assert (await office.verify()).difference is None


async def test_the_archives_reader_has_the_archives_own_settings(office: Office) -> None:
    """Also where another service made the reader before, which does not know the settings."""
    await office.bus.ensure_stream("USAGE")
    office.settings = office.settings.model_copy(update={"archive_ack_wait_s": 450.0, "archive_pending_max": 9000})
    office.archive()

    async def reader() -> tuple[float | None, int | None]:
        config = (await office.bus.jetstream.consumer_info("USAGE", ARCHIVE)).config
        return config.ack_wait, config.max_ack_pending

    assert await eventually(reader, lambda found: found[0] != ARCHIVE_ACK_WAIT_S, within_s=20) == (450, 9000)


async def test_a_store_that_is_away_holds_the_events_and_two_replicas_share_the_chain(office: Office) -> None:
    archivers = [office.archive(), office.archive()]
    objects = office.folder
    objects.rename(objects.with_name("away"))
    objects.write_bytes(b"a file where the folder was")
    await prepare(office.world)
    office.relay()
    office.book()
    await office.publish(*story())
    await office.until(BOOKED, STORY)
    await office.until("SELECT count(*) > 0 FROM archive_writes", True)
    assert not await office.world.pool.fetchval("SELECT count(*) FROM archive_files")
    info = await office.bus.jetstream.consumer_info("USAGE", ARCHIVE)
    assert (info.num_ack_pending or 0) > 0 and (await office.verify()).difference is None
    objects.unlink()
    objects.with_name("away").rename(objects)
    await office.everything_answered()
    agreed = await office.verify()
    assert agreed.difference is None, agreed.difference
    assert agreed.events == STORY
    assert all(not archiver.done() for archiver in archivers)
    positions = await office.world.pool.fetch("SELECT position FROM archive_files ORDER BY 1")
    assert [row["position"] for row in positions] == list(range(1, len(positions) + 1))


async def test_events_that_wait_too_long_make_the_archive_ill_until_they_are_filed(office: Office) -> None:
    told: list[bool] = []

    async def tell(well: bool) -> None:
        told.append(well)

    clock = ManualClock()
    watch = ArchiveWatch(office.bus, office.settings, tell, clock=clock)
    await watch.look()
    office.archive()
    objects = office.folder
    objects.rename(objects.with_name("away"))
    objects.write_bytes(b"a file where the folder was")
    await prepare(office.world)
    office.relay()
    await office.publish(*story())
    await office.until("SELECT count(*) > 0 FROM archive_writes", True)
    await watch.look()
    clock.jump(office.settings.archive_late_s - 1)
    await watch.look()
    assert told == []
    clock.jump(1)
    for _ in range(2):
        await watch.look()
        assert told == [False]
    objects.unlink()
    objects.with_name("away").rename(objects)
    await office.everything_answered()
    await watch.look()
    # What comes later has all its time, however long nothing came.
    clock.jump(office.settings.archive_late_s)
    await office.publish(minute_now(9))
    await watch.look()
    assert told == [False, True]


async def test_damage_and_forgery_are_named(office: Office) -> None:
    await run_story(office)
    first, second = office.files()[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = (await office.verify()).difference
    assert found is not None and first.name in found.location and "SHA-256" in found.expected
    first.write_bytes(whole)
    kept = second.read_bytes()
    second.unlink()
    found = (await office.verify()).difference
    assert found is not None and second.name in found.location and found.found == "no file"
    second.write_bytes(kept)
    assert (await office.verify()).difference is None


async def test_what_no_event_claims_and_what_is_not_booked_are_named(office: Office, postgres: PostgresServer) -> None:
    await run_story(office)
    pool = office.world.pool
    # Booked past every event, as by somebody who can write to the database.
    late = minute_now(77)
    await office.world.deliver(late)
    found = (await office.verify()).difference
    assert found is not None and "ep_1:7:77" in found.location and found.expected == "an event that claims it"
    assert (await office.verify("a")).difference is None
    await office.publish(late)
    await office.until(BOOKED, STORY + 1)
    assert (await office.verify()).difference is None
    # An event that was handled, and has left nothing.
    await pool.execute("GRANT UPDATE, DELETE ON usage_records TO CURRENT_USER")
    await pool.execute("ALTER TABLE usage_records DISABLE TRIGGER USER")
    await pool.execute("DELETE FROM usage_records WHERE work_key = 'gen-2-2:input'")
    found = (await office.verify()).difference
    assert found is not None and "gen-2-2:input" in found.location and found.found == "nothing"


async def test_files_past_their_retention_go_and_the_rest_still_agrees(office: Office) -> None:
    await run_story(office)
    settings = office.settings.model_copy(update={"archive_retention_s": 0.001})
    await office.until("SELECT count(*) = 0 FROM archive_files WHERE last_time > now() - interval '10 ms'", True)
    await ArchiveKeeper(office.world.pool, office.objects, settings, clock=SystemClock()).keep()
    assert office.files() == []
    await office.publish(minute_now(78))
    await office.until(BOOKED, STORY + 1)
    await office.everything_answered()
    agreed = await office.verify()
    assert agreed.difference is None, agreed.difference
    assert agreed.older_records > 0 and agreed.begin_time is not None
