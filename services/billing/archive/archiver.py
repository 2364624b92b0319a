"""Writes the events that money follows from to the archive before they leave the bus. Not pure: bus, database, objects.

It gathers events for a while, stores them as a file, adds the file to the chain, and only then answers the bus. A
process that dies anywhere before that leaves its events to be delivered again; so an event may be in two files, and
whoever reads the archive takes each event once, by its id. It books nothing.
"""

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
from nats.aio.msg import Msg
from opentelemetry import metrics

from chassis.backoff import Backoff
from chassis.bus.connection import BUS_FAILURES, Bus
from chassis.bus.durable_reader import DurableReader
from chassis.bus.durables import ARCHIVE
from chassis.clock import Clock
from chassis.db.pool import Pool, database_is_away, transaction
from chassis.errors import is_away
from chassis.objects.object_store import ObjectStore
from services.billing.archive.archive_format import ArchivedEvent, pack
from services.billing.archive.store import ArchiveStore
from services.billing.archive.work_claims import read_claims
from services.billing.config import BillingSettings

SUBJECTS: Mapping[str, tuple[str, ...]] = {"USAGE": ("usage.>",), "TUNING": ("tuning.job.ended",)}
_log = structlog.get_logger(__name__)
_meter = metrics.get_meter(__name__)
_archived = _meter.create_counter("billing.archived_events", unit="{event}")
_waiting = _meter.create_gauge("billing.archive_waiting", unit="{event}")


@dataclass(kw_only=True)
class _Gathered:
    """Events of one stream that no file holds yet."""

    since_s: float
    messages: list[Msg] = field(default_factory=list)
    size_bytes: int = 0


class Archiver:
    """Any number may run, in as many processes: the bus gives each event to one, and a place in the chain has one
    file."""

    def __init__(self, pool: Pool, bus: Bus, objects: ObjectStore, settings: BillingSettings, *, clock: Clock) -> None:
        self._pool = pool
        self._objects = objects
        self._settings = settings
        self._clock = clock
        self._gathered: dict[str, _Gathered] = {}
        self._reader = DurableReader(
            bus,
            ARCHIVE,
            SUBJECTS,
            self._take,
            clock=clock,
            batch_max=settings.archive_fetch_max,
            ack_wait_s=settings.archive_ack_wait_s,
            pending_max=settings.archive_pending_max,
        )

    async def run(self) -> None:
        """Runs until stopped or cancelled. Whatever is away is waited for: the streams hold the events meanwhile."""
        await self._reader.run()

    async def stop(self) -> None:
        """Fetches no more and stores what was gathered."""
        await self._reader.stop()

    async def _take(self, stream: str, messages: Sequence[Msg]) -> None:
        now_s = self._clock.monotonic()
        gathered = self._gathered.setdefault(stream, _Gathered(since_s=now_s))
        gathered.messages += messages
        gathered.size_bytes += sum(len(message.data) for message in messages)
        waiting = messages[-1].metadata.num_pending or 0 if messages else 0
        _waiting.set(waiting + len(gathered.messages), {"stream": stream})
        if not gathered.messages:
            gathered.since_s = now_s
            return
        settings = self._settings
        if (
            now_s - gathered.since_s >= settings.archive_interval_s
            or len(gathered.messages) >= settings.archive_file_events_max
            or gathered.size_bytes >= settings.archive_file_bytes_max
            or self._reader.is_stopping
        ):
            del self._gathered[stream]
            await self._store_until_done(stream, gathered.messages)

    async def _store_until_done(self, stream: str, messages: Sequence[Msg]) -> None:
        """Tries until half of the time is over after which the bus gives the events to somebody else."""
        backoff = Backoff(first_s=self._settings.reconnect_backoff_s_min, last_s=self._settings.archive_backoff_s_max)
        give_up_at = self._clock.monotonic() + self._settings.archive_ack_wait_s / 2
        while True:
            try:
                await self._store(messages)
            except Exception as error:
                if not (database_is_away(error) or is_away(error)):
                    raise
                _log.error("archive_waits", stream=stream, events=len(messages), error=repr(error))
                if self._reader.is_stopping or self._clock.monotonic() >= give_up_at:
                    return
                await self._clock.sleep(backoff.next_s())
                continue
            break
        for message in messages:
            try:
                await message.ack()
            except BUS_FAILURES as error:
                # It comes again, and will be in two files.
                _log.warning("answer_lost", durable=ARCHIVE, error=repr(error))
                return

    async def _store(self, messages: Sequence[Msg]) -> None:
        events = sorted((event_of(message) for message in messages), key=lambda event: event.sequence)
        # The same event twice in one batch: it was delivered again while it waited here.
        by_place = {event.sequence: event for event in events}
        for _, of_a_day in itertools.groupby(by_place.values(), key=lambda event: event.time.date()):
            for chunk in _chunks(of_a_day, self._settings.archive_file_bytes_max):
                await self._store_file(chunk)
        _archived.add(len(by_place))

    async def _store_file(self, events: Sequence[ArchivedEvent]) -> None:
        organizations = {claim.organization_id for event in events for claim in read_claims(event.type, event.payload)}
        while True:
            async with self._pool.acquire() as connection:
                position, previous = await ArchiveStore(connection).head()
            # Compression takes a while: not on the loop.
            file = await asyncio.to_thread(pack, events, position=position + 1, previous_sha256=previous)
            async with transaction(self._pool) as connection:
                await ArchiveStore(connection).begin_write(file.key)
            await self._objects.put_synced(file.key, file.content)
            async with transaction(self._pool) as connection:
                if await ArchiveStore(connection).add(file, organizations):
                    return
            # Another process was faster, and the chain goes on from its file.
            await self._objects.remove(file.key)
            async with transaction(self._pool) as connection:
                await ArchiveStore(connection).end_write(file.key)


def event_of(message: Msg) -> ArchivedEvent:
    place = message.metadata
    return ArchivedEvent(
        stream=place.stream,
        sequence=place.sequence.stream,
        time=place.timestamp,
        subject=message.subject,
        headers=dict(message.headers or {}),
        payload=message.data,
    )


def _chunks(events: Iterable[ArchivedEvent], size_bytes_max: int) -> Iterator[list[ArchivedEvent]]:
    """Runs of events whose payloads are about that large together, or of one event."""
    chunk: list[ArchivedEvent] = []
    size_bytes = 0
    for event in events:
        if chunk and size_bytes + len(event.payload) > size_bytes_max:
            yield chunk
            chunk, size_bytes = [], 0
        chunk.append(event)
        size_bytes += len(event.payload)
    if chunk:
        yield chunk
