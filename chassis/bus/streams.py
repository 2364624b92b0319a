"""Keeps streams flat, and gives a bus that lost its disk what it lost. Not pure: bus, database.

What every reader has handled leaves its stream at each look. The incarnation and the end of each stream are remembered
beside the outbox: a server that comes back with another incarnation, or an earlier end, gets all kept events again but
those that every reader had handled. It knows no stream by name, and deletes no event that a reader has yet to handle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog
from nats.js import api
from nats.js.errors import NotFoundError
from opentelemetry import metrics

from chassis.bus.connection import BUS_FAILURES, Bus
from chassis.bus.outbox import QUERIES
from chassis.bus.subjects import stream_of
from chassis.db.pool import Pool, database_is_away, transaction
from chassis.db.queries import affected

_log = structlog.get_logger(__name__)
_meter = metrics.get_meter(__name__)
_share = _meter.create_gauge("bus.stream_share", unit="1")
_events = _meter.create_gauge("bus.stream_events", unit="{event}")
_again = _meter.create_counter("outbox.published_again", unit="{event}")


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What was remembered of a stream at `look_time`, before the bus was asked; nothing of a new one."""

    look_time: datetime
    incarnation: str | None = None
    epoch: int = 1
    last_sequence: int = 0
    # Some of its events may still have to be published again.
    is_lost: bool = False


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What the bus says of a stream: all of it of one incarnation."""

    info: api.StreamInfo
    incarnation: str
    handled_sequence: int


class StreamKeeper:
    """Of the streams that one service publishes to. Any number may run: what they decide is guarded by the row."""

    def __init__(self, pool: Pool, bus: Bus) -> None:
        self._pool = pool
        self._bus = bus
        self._last: dict[str, int] = {}

    def is_behind(self, stream: str, sequence: int) -> bool:
        """True when the bus gives a new event a place that it had given away before: it lost something."""
        return sequence <= self._last.get(stream, 0)

    async def look_after_all(self) -> bool:
        """Looks once at each stream that this service ever published to; a bus that is away is left for later.

        True when events wait to be published again.
        """
        publish_again = False
        for family in await self._families():
            try:
                publish_again |= await self.look(stream_of(f"{family}.>"))
            except BUS_FAILURES as error:
                _log.warning("stream_look_postponed", family=family, error=repr(error))
                break
            except Exception as error:
                if database_is_away(error):
                    raise
                # A defect with one stream leaves the others flat.
                _log.error("stream_look_failed", family=family, exc_info=error)
        return publish_again

    async def look(self, stream: str) -> bool:
        """Makes the stream and its readers where they are missing, remembers it, and lets go what is handled.

        True when it was lost, and events wait to be published again.
        """
        known = await self._read(stream)
        found = await self._ask(stream)
        self._last[stream] = found.info.state.last_seq
        written = await self._remember(stream, known, found)
        if known.is_lost or not written:
            await self._publish_again(stream)
            return True
        info = found.info
        if found.handled_sequence >= info.state.first_seq and info.state.messages:
            await self._bus.jetstream.purge_stream(stream, seq=found.handled_sequence + 1)
            info = await self._bus.jetstream.stream_info(stream)
            if _incarnation(info) != found.incarnation:
                # The server came back empty just now, and the purge may have met events of the new stream.
                await self._remember(stream, await self._read(stream), await self._ask(stream), lost=True)
                await self._publish_again(stream)
                return True
        await self._measure(stream, info)
        return False

    async def _ask(self, stream: str) -> _Found:
        await self._bus.ensure_stream(stream)
        try:
            return await self._ask_once(stream)
        except NotFoundError:
            # The server lost it since this process made it.
            await self._bus.recover()
            await self._bus.ensure_stream(stream)
            return await self._ask_once(stream)

    async def _ask_once(self, stream: str) -> _Found:
        before = await self._bus.jetstream.stream_info(stream)
        readers = await self._bus.jetstream.consumers_info(stream)
        info = await self._bus.jetstream.stream_info(stream)
        missing = {durable.name for durable in self._bus.durables.get(stream, ())} - {each.name for each in readers}
        if missing:
            _log.error("stream_reader_missing", stream=stream, readers=sorted(missing))
            await self._bus.recover()
            await self._bus.ensure_stream(stream)
        same = _incarnation(before) == _incarnation(info) and not missing
        handled = handled_by_all(readers, last_sequence=before.state.last_seq) if same else 0
        return _Found(info=before if same else info, incarnation=_incarnation(info), handled_sequence=handled)

    async def _remember(self, stream: str, known: _Known, found: _Found, *, lost: bool = False) -> bool:
        """Writes down what was found; False when the bus had lost something, or somebody else wrote meanwhile."""
        family, last_sequence = stream.lower(), found.info.state.last_seq
        lost = lost or (
            known.incarnation is not None
            and (known.incarnation != found.incarnation or last_sequence < known.last_sequence)
        )
        values = {
            "family": family,
            "incarnation": found.incarnation,
            "last_sequence": last_sequence,
            "look_time": known.look_time,
        }
        async with transaction(self._pool) as connection:
            if known.incarnation is None:
                await QUERIES.add_stream(connection, **values)
                return True
            if not lost:
                seen = await QUERIES.see_stream(
                    connection, **values, epoch=known.epoch, handled_sequence=found.handled_sequence
                )
                return affected(seen) == 1
            if affected(await QUERIES.lose_stream(connection, **values, epoch=known.epoch)):
                _log.error(
                    "stream_lost", stream=stream, last_sequence=last_sequence, known_last_sequence=known.last_sequence
                )
        return False

    async def _publish_again(self, stream: str) -> None:
        """Batch after batch, each in a transaction of its own; who dies in between leaves the rest to the next look."""
        family, batch_max = stream.lower(), self._bus.settings.prune_batch_max
        known = await self._read(stream)
        count = batch_max if known.is_lost else 0
        while count == batch_max:
            async with transaction(self._pool) as connection:
                count = affected(await QUERIES.publish_again(connection, family=family, batch_max=batch_max))
                if count < batch_max:
                    await QUERIES.end_publishing_again(connection, family=family, epoch=known.epoch)
            _again.add(count, {"family": family})
            _log.warning("events_published_again", stream=stream, events=count)

    async def _measure(self, stream: str, info: api.StreamInfo) -> None:
        settings = self._bus.settings
        size_max = info.config.max_bytes or settings.stream_size_bytes_max
        share = info.state.bytes / size_max
        _share.set(share, {"stream": stream})
        _events.set(info.state.messages, {"stream": stream})
        fills_up = share >= settings.stream_alarm_share and info.config.discard == api.DiscardPolicy.NEW
        if fills_up:
            _log.error("stream_fills_up", stream=stream, share=round(share, 3), size_bytes_max=size_max)
        await self._bus.room.note(stream, troubled=fills_up)

    async def _families(self) -> list[str]:
        async with self._pool.acquire() as connection:
            return [row["family"] async for row in QUERIES.list_streams(connection)]

    async def _read(self, stream: str) -> _Known:
        async with self._pool.acquire() as connection:
            row = await QUERIES.get_stream(connection, family=stream.lower())
        return _Known(**row)


def handled_by_all(readers: Sequence[api.ConsumerInfo], *, last_sequence: int) -> int:
    """The last sequence up to which every reader has handled what is for it; 0 where nobody reads.

    `last_sequence` was the stream's before the readers were asked.
    """
    return min((_handled_by(reader, last_sequence) for reader in readers), default=0)


def _handled_by(reader: api.ConsumerInfo, last_sequence: int) -> int:
    if reader.num_pending == 0 and reader.num_ack_pending == 0:
        return last_sequence
    return reader.ack_floor.stream_seq if reader.ack_floor is not None else 0


def _incarnation(info: api.StreamInfo) -> str:
    """When the server made the stream: another one of the same name was made at another time."""
    return info.created.isoformat() if info.created is not None else ""
