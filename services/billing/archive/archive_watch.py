"""Tells when events have waited too long for the archive. Not pure: bus.

It asks the bus how far the archive's reader has come. So it sees whatever stops the archive: the object store, the
database, an archiver that is too slow, or another replica that has the events. It archives nothing.
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import structlog
from nats.js.errors import NotFoundError

from chassis.backoff import Backoff
from chassis.bus.connection import BUS_FAILURES, Bus
from chassis.bus.durables import ARCHIVE
from chassis.clock import Clock
from chassis.rounds import run_rounds
from services.billing.archive.archiver import SUBJECTS
from services.billing.config import BillingSettings

_log = structlog.get_logger(__name__)


class _Mark(NamedTuple):
    """The end of a stream when it was looked at: all until there is to be archived in time."""

    sequence: int
    time_s: float


class ArchiveWatch:
    """Any number may watch: each finds the same. Time is monotonic, so a clock that is set makes nothing late."""

    def __init__(
        self, bus: Bus, settings: BillingSettings, tell: Callable[[bool], Awaitable[None]], *, clock: Clock
    ) -> None:
        """`tell` hears that the archive is late, and that it is well again."""
        self._bus = bus
        self._settings = settings
        self._tell = tell
        self._clock = clock
        self._marks: dict[str, _Mark] = {}
        self._well = True

    async def run(self) -> None:
        """Looks until cancelled; a bus that is away is waited for."""
        settings = self._settings
        await run_rounds(
            "archive_watch",
            self.look,
            wait=lambda: self._clock.sleep(settings.archive_look_interval_s),
            clock=self._clock,
            backoff=Backoff(first_s=settings.reconnect_backoff_s_min, last_s=settings.reconnect_backoff_s_max),
            is_passing=lambda error: isinstance(error, BUS_FAILURES),
        )

    async def look(self) -> None:
        late = [stream for stream in SUBJECTS if await self._is_late(stream)]
        if late:
            _log.error("archive_late", streams=late, late_after_s=self._settings.archive_late_s)
        if self._well == bool(late):
            self._well = not late
            await self._tell(self._well)

    async def _is_late(self, stream: str) -> bool:
        now_s = self._clock.monotonic()
        try:
            last_sequence = (await self._bus.jetstream.stream_info(stream)).state.last_seq
            reader = await self._bus.jetstream.consumer_info(stream, ARCHIVE)
        except NotFoundError:
            # Not made yet, or lost by the bus: then its events come again, as new ones.
            self._marks.pop(stream, None)
            return False
        nothing_waits = not reader.num_pending and not reader.num_ack_pending
        archived = reader.ack_floor.stream_seq if reader.ack_floor is not None else 0
        mark = self._marks.get(stream)
        if mark is None or nothing_waits or archived >= mark.sequence or last_sequence < mark.sequence:
            self._marks[stream] = _Mark(last_sequence, now_s)
            return False
        return now_s - mark.time_s >= self._settings.archive_late_s
