"""Reads files of the archive, and the events that still wait on the bus. Not pure: bus, objects.

Each file is checked against its place in the chain before anything of it is believed.
"""

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator

from nats.errors import TimeoutError as BusTimeoutError
from nats.js import api
from nats.js.errors import NotFoundError

from chassis.bus.connection import BUS_FAILURES, Bus
from chassis.bus.durables import ARCHIVE
from chassis.errors import Unavailable
from chassis.objects.object_store import ObjectMissing, ObjectStore
from services.billing.archive.archive_format import PREFIX, ArchivedEvent, ArchiveUnreadable, unpack
from services.billing.archive.archiver import SUBJECTS, event_of
from services.billing.archive.store import FileRow

_CHUNK_BYTES = 1024 * 1024
_KEYS_AT_A_TIME = 1000


class ArchiveDamaged(Exception):
    """A file is not what the chain says: `expected` and `found`, for people."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected = expected
        self.found = found


async def read_file(objects: ObjectStore, row: FileRow, *, unpacked_bytes_max: int) -> list[ArchivedEvent]:
    """The events of one file; ArchiveDamaged when it is gone or was changed, Unavailable while the store is away."""
    content = bytearray()
    try:
        async for chunk in objects.read(row.object_key, chunk_bytes_max=_CHUNK_BYTES):
            content += chunk
            if len(content) > row.size_bytes:
                raise ArchiveDamaged(f"{row.size_bytes} bytes", "more")
    except ObjectMissing:
        raise ArchiveDamaged(f"a file with SHA-256 {row.sha256.hex()}", "no file") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != row.sha256.hex():
        raise ArchiveDamaged(f"SHA-256 {row.sha256.hex()}", f"SHA-256 {digest}")
    try:
        header, events = await asyncio.to_thread(unpack, bytes(content), unpacked_bytes_max=unpacked_bytes_max)
    except ArchiveUnreadable as error:
        raise ArchiveDamaged("a file of the archive", str(error)) from None
    place = (header.position, header.previous_sha256, header.stream, header.event_count)
    listed = (row.position, row.previous_sha256.hex(), row.stream, row.event_count)
    if place != listed:
        raise ArchiveDamaged(f"a first line with {listed}", f"{place}")
    return events


async def read_all(objects: ObjectStore, *, unpacked_bytes_max: int) -> AsyncIterator[ArchivedEvent]:
    """Every event that the store has, file by file in the order of the chain, without any database.

    ArchiveDamaged where a file is missing, unreadable, or not the one that the file after it names. An event may come
    twice. A file that is in no chain, because its writer died, has events that come again in another one.
    """
    keys = sorted([key async for key in objects.list_keys(PREFIX, batch_max=_KEYS_AT_A_TIME)], key=_position)
    before: set[str] = set()
    position_before = None
    for position, at_position in itertools.groupby(keys, key=_position):
        digests: set[str] = set()
        named: set[str] = set()
        for key in at_position:
            content = b"".join([chunk async for chunk in objects.read(key, chunk_bytes_max=_CHUNK_BYTES)])
            try:
                header, events = await asyncio.to_thread(unpack, content, unpacked_bytes_max=unpacked_bytes_max)
            except ArchiveUnreadable as error:
                raise ArchiveDamaged(f"{key}: a file of the archive", str(error)) from None
            digests.add(hashlib.sha256(content).hexdigest())
            named.add(header.previous_sha256)
            for event in events:
                yield event
        if position_before is not None and (position != position_before + 1 or not named & before):
            raise ArchiveDamaged(f"a file {position - 1} with SHA-256 {', '.join(sorted(named))}", "none")
        before, position_before = digests, position


def _position(key: str) -> int:
    return int(key.rpartition("/")[2].partition("-")[0])


async def read_waiting(bus: Bus, *, batch_max: int) -> AsyncIterator[ArchivedEvent]:
    """The events that the bus holds and no file does; those that come meanwhile may be left out.

    Unavailable while the bus cannot say.
    """
    for stream, subjects in SUBJECTS.items():
        try:
            async for event in _read_stream(bus, stream, subjects, batch_max):
                yield event
        except NotFoundError:
            # A bus without the stream or its reader has nothing of it.
            continue
        except BUS_FAILURES as error:
            raise Unavailable("DEPENDENCY_UNAVAILABLE", f"the event bus cannot be asked for {stream}") from error


async def _read_stream(
    bus: Bus, stream: str, subjects: tuple[str, ...], batch_max: int
) -> AsyncIterator[ArchivedEvent]:
    last = (await bus.jetstream.stream_info(stream)).state.last_seq
    reader = await bus.jetstream.consumer_info(stream, ARCHIVE)
    archived = reader.ack_floor.stream_seq if reader.ack_floor is not None else 0
    if archived >= last or (reader.num_pending == 0 and reader.num_ack_pending == 0):
        return
    config = api.ConsumerConfig(
        deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=archived + 1,
        ack_policy=api.AckPolicy.NONE,
        filter_subjects=list(subjects),
        inactive_threshold=60.0,
        mem_storage=True,
    )
    made = await bus.jetstream.add_consumer(stream, config)
    subscription = await bus.jetstream.pull_subscribe_bind(made.name, stream=stream)
    try:
        while True:
            try:
                messages = await subscription.fetch(batch_max, timeout=bus.settings.publish_timeout_s)
            except BusTimeoutError:
                return
            for message in messages:
                yield event_of(message)
            if not messages[-1].metadata.num_pending or messages[-1].metadata.sequence.stream >= last:
                return
    finally:
        await subscription.unsubscribe()
