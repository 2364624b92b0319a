"""Keeps streams from filling up: deletes what every durable reader has handled, and warns long before the limit.

It knows no stream by name, and deletes no event that a reader still has to handle.
"""

from collections.abc import Collection, Sequence

import structlog
from nats.js import api
from nats.js.errors import NotFoundError
from opentelemetry import metrics

from chassis.bus.connection import BUS_FAILURES, Bus

_log = structlog.get_logger(__name__)
_share = metrics.get_meter(__name__).create_gauge("bus.stream_share", unit="1")


async def look_after(bus: Bus, streams: Collection[str]) -> None:
    """Looks once at each of the streams. One that does not exist, or a bus that is away, is left for the next look."""
    for stream in sorted(streams):
        try:
            await _look_after(bus, stream)
        except NotFoundError:
            continue
        except BUS_FAILURES as error:
            _log.warning("stream_look_postponed", stream=stream, error=repr(error))
            return


async def _look_after(bus: Bus, stream: str) -> None:
    settings = bus.settings
    info = await bus.jetstream.stream_info(stream)
    size_max = info.config.max_bytes or settings.stream_size_bytes_max
    if info.state.bytes >= size_max * settings.stream_trim_share:
        readers = await bus.jetstream.consumers_info(stream)
        handled = handled_by_all(readers, last_sequence=info.state.last_seq)
        if handled >= info.state.first_seq:
            await bus.jetstream.purge_stream(stream, seq=handled + 1)
            _log.info("stream_trimmed", stream=stream, events=handled + 1 - info.state.first_seq)
            info = await bus.jetstream.stream_info(stream)
    share = info.state.bytes / size_max
    _share.set(share, {"stream": stream})
    if share >= settings.stream_alarm_share:
        _log.error("stream_fills_up", stream=stream, share=round(share, 3), size_bytes_max=size_max)


def handled_by_all(readers: Sequence[api.ConsumerInfo], *, last_sequence: int) -> int:
    """The last sequence up to which every reader has handled what is for it; 0 where nobody reads.

    `last_sequence` was the stream's before the readers were asked.
    """
    return min((_handled_by(reader, last_sequence) for reader in readers), default=0)


def _handled_by(reader: api.ConsumerInfo, last_sequence: int) -> int:
    if reader.num_pending == 0 and reader.num_ack_pending == 0:
        return last_sequence
    return reader.ack_floor.stream_seq if reader.ack_floor is not None else 0
