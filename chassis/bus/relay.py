"""Carries outbox rows to JetStream until the bus has acknowledged each of them. It never looks into an event.

Each stream is served apart: one that is full or away is left alone for a while, and the others go on. So is an event
that can never be published as it is.

Load (claim, one short transaction), publish (no transaction), apply (mark, one statement). A relay that dies between
the last two publishes again after its claim ran out: the event id makes that harmless.
"""

import asyncio
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import asyncpg
import nats.errors
import structlog
from nats.js import api
from opentelemetry import metrics

from chassis.backoff import Backoff
from chassis.bus.connection import BUS_FAILURES, Bus, is_stream_full
from chassis.bus.outbox import QUERIES, Outbox, prune
from chassis.bus.streams import StreamKeeper
from chassis.bus.subjects import family_of, stream_of
from chassis.clock import Clock
from chassis.db.pool import Pool, database_is_away, transaction

_log = structlog.get_logger(__name__)
_DAWN = datetime.min.replace(tzinfo=UTC)
# The bus says them of one event; it takes all others.
_EVENT_DEFECTS = (nats.errors.MaxPayloadError, nats.errors.BadSubjectError)
_published = metrics.get_meter(__name__).create_counter("outbox.published", unit="{event}")


@dataclass
class _Block:
    """A stream that refuses events is tried again at `until`."""

    backoff: Backoff
    since: float
    until: float = 0.0


class _Defect(Exception):
    """Why one event cannot be published as it is, whatever its stream does."""


class Relay:
    """Any number may run on one outbox, in one process or many: a row is claimed, never polled by its id."""

    def __init__(self, pool: Pool, bus: Bus, outbox: Outbox, *, clock: Clock) -> None:
        self._pool = pool
        self._bus = bus
        self._outbox = outbox
        self._clock = clock
        self._settings = bus.settings
        self._running = False
        self._stopping = False
        self._stopped = asyncio.Event()
        self._prune_at = clock.monotonic() + self._settings.prune_interval_s
        self._look_at = clock.monotonic()
        # Everything older is published; `_DAWN` while that is not known.
        self._since = _DAWN
        self._look_whole_at = clock.monotonic()
        self._keeper = StreamKeeper(pool, bus)
        self._ready: set[str] = set()
        self._blocked: dict[str, _Block] = {}
        bus.before_close(self.stop)

    async def run(self) -> None:
        """Runs until stopped or cancelled. A bus or database that is away is waited for; only a defect ends it."""
        backoff = self._new_backoff()
        self._running = True
        self._stopped.clear()
        try:
            while not self._stopping:
                if await self._round():
                    backoff.reset()
                else:
                    await self._clock.sleep(backoff.next_s())
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """Lets the round under way finish and publishes what the last calls left; `Bus.close` calls it."""
        self._stopping = True
        self._outbox.wake()
        if self._running:
            await self._stopped.wait()
        await self._round()

    async def _round(self) -> bool:
        """Publishes one batch and waits for more; False when bus or database could not do their part."""
        try:
            claimed, _ = await self.publish_batch()
            await self._look_when_due()
            more_to_prune = await self._prune_when_due()
        except Exception as error:
            if not (database_is_away(error) or isinstance(error, BUS_FAILURES)):
                raise
            _log.warning("relay_waits", error=repr(error))
            return False
        if claimed < self._settings.outbox_batch_max and not self._stopping and not more_to_prune:
            await self._outbox.wait(self._pause_s())
        return True

    def _pause_s(self) -> float:
        """Until the next poll, or until a stream is to be tried again."""
        now = self._clock.monotonic()
        return max(0.0, min([self._settings.outbox_poll_s, *(block.until - now for block in self._blocked.values())]))

    async def publish_batch(self) -> tuple[int, int]:
        """One round over at most `outbox_batch_max` events of each stream; returns how many were claimed, how many
        published."""
        now = self._clock.monotonic()
        blocked = [family for family, block in self._blocked.items() if block.until > now]
        if now >= self._look_whole_at:
            self._since = _DAWN
        async with transaction(self._pool) as connection:
            at = await QUERIES.get_time(connection)
            rows = [
                row
                async for row in QUERIES.claim_events(
                    connection,
                    lease_s=self._settings.outbox_lease_s,
                    batch_max=self._settings.outbox_batch_max,
                    blocked=blocked,
                    since=self._since,
                )
            ]
        unready = await self._get_ready({stream_of(row["subject"]) for row in rows})
        errors = await asyncio.gather(*(self._publish(row, unready) for row in rows))
        failed = {row["id"]: error for row, error in zip(rows, errors, strict=True) if error is not None}
        published = [row for row in rows if row["id"] not in failed]
        refused = {id: error for id, error in failed.items() if not isinstance(error, _Defect)}
        if rows:
            # A defective event stays claimed, so that it is tried again only when its claim is over.
            await self._mark(published, list(refused))
        _published.add(len(published))
        await self._block(
            {family_of(row["subject"]): refused[row["id"]] for row in rows if row["id"] in refused}, blocked
        )
        if self._since == _DAWN and not failed and not self._blocked:
            self._look_less(min([at, *(row["created_at"] for row in rows)]))
        if refused:
            self._ready.clear()
            await self._bus.recover()
        return len(rows), len(published)

    def _look_less(self, oldest: datetime) -> None:
        """After a look at all, whose oldest event is given: for a while only what is not much older is looked at.

        Rows that were published stay in the index of those that wait until VACUUM takes them out, which it cannot while
        an old snapshot is held, as by a backup. A claim that begins at the first of them reads them all.
        """
        self._since = oldest - timedelta(seconds=self._settings.outbox_look_back_s)
        self._look_whole_at = self._clock.monotonic() + self._settings.outbox_look_whole_s

    def _look_from(self, publish_again: bool) -> None:
        """Events that are to be published again are older than any that waits."""
        if publish_again:
            self._since = _DAWN

    async def _get_ready(self, streams: Collection[str]) -> dict[str, Exception]:
        """Looks at streams that were not used since the last failure: what was lost is found before more is published.

        The answer names those that are not to be used now, and why.
        """
        unready: dict[str, Exception] = {}
        for stream in sorted(set(streams) - self._ready):
            try:
                self._look_from(await self._keeper.look(stream))
            except BUS_FAILURES as error:
                unready[stream] = error
            except Exception as error:
                if database_is_away(error):
                    raise
                _log.error("stream_look_failed", stream=stream, exc_info=error)
                unready[stream] = error
            else:
                self._ready.add(stream)
        return unready

    async def _block(self, failures: Mapping[str, Exception], still_blocked: Collection[str]) -> None:
        """Leaves the streams that just refused events alone for a while, and forgets those that took theirs."""
        for family in self._blocked.keys() - failures.keys() - set(still_blocked):
            del self._blocked[family]
            await self._bus.publishing.note(family, troubled=False)
        now = self._clock.monotonic()
        for family, failure in failures.items():
            block = self._blocked.setdefault(family, _Block(self._new_backoff(), since=now))
            block.until = now + block.backoff.next_s()
            _log.warning("publish_failed", family=family, error=repr(failure))
            # A full stream is told of by its keeper: only its readers can cure it.
            stalled = now - block.since >= self._settings.publish_alarm_s and not is_stream_full(failure)
            if stalled:
                _log.error("publishing_stalled", family=family, for_s=round(now - block.since, 1), error=repr(failure))
            await self._bus.publishing.note(family, troubled=stalled)

    def _new_backoff(self) -> Backoff:
        return Backoff(first_s=self._settings.reconnect_backoff_s_min, last_s=self._settings.reconnect_backoff_s_max)

    async def _publish(self, row: asyncpg.Record, unready: Mapping[str, Exception]) -> Exception | None:
        stream = stream_of(row["subject"])
        if stream in unready:
            return unready[stream]
        headers = {**row["headers"], api.Header.MSG_ID.value: str(row["id"])}
        try:
            answer = await self._bus.jetstream.publish(row["subject"], row["payload"], stream=stream, headers=headers)
        except Exception as error:
            if isinstance(error, BUS_FAILURES) and not isinstance(error, _EVENT_DEFECTS):
                return error
            _log.error("event_not_published", event_id=str(row["id"]), subject=row["subject"], exc_info=error)
            return _Defect(repr(error))
        if not answer.duplicate and self._keeper.is_behind(stream, answer.seq):
            self._look_at = self._clock.monotonic()
        return None

    async def _mark(self, published: Sequence[asyncpg.Record], failed: list[uuid.UUID]) -> None:
        """An event that was claimed before its stream was lost may have gone with it: it is published again."""
        families = sorted({family_of(row["subject"]) for row in published})
        async with transaction(self._pool) as connection:
            epochs = {row["family"]: row["epoch"] async for row in QUERIES.lock_epochs(connection, families=families)}
            kept = [row["id"] for row in published if (row["epoch"] or 1) == epochs[family_of(row["subject"])]]
            again = [row["id"] for row in published if (row["epoch"] or 1) != epochs[family_of(row["subject"])]]
            if kept:
                await QUERIES.mark_published(connection, ids=kept)
            if failed or again:
                await QUERIES.release_claims(connection, ids=failed + again)

    async def _look_when_due(self) -> None:
        if self._clock.monotonic() >= self._look_at:
            self._look_at = self._clock.monotonic() + self._settings.stream_look_interval_s
            self._look_from(await self._keeper.look_after_all())

    async def _prune_when_due(self) -> bool:
        """Deletes one batch of each table; True when there may be more, which the next round deletes at once.

        So pruning keeps up with any rate of events, and no round is kept from publishing for longer than a batch.
        """
        if self._clock.monotonic() < self._prune_at:
            return False
        async with transaction(self._pool) as connection:
            deleted = await prune(connection, self._settings)
        if deleted:
            _log.info("events_pruned", rows=deleted)
        if deleted >= self._settings.prune_batch_max:
            return True
        self._prune_at = self._clock.monotonic() + self._settings.prune_interval_s
        return False
