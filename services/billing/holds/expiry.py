"""Ends holds of jobs of which nothing more will come. Not pure: database, bus.

No time alone ends a hold: usage of a job may come days late, when billing, the bus or the scheduler was away. What ends
it is the scheduler's word that it published all there is, while billing has nothing of the job unread or set aside.
"""

import enum
from collections.abc import Mapping
from datetime import datetime

import structlog
from opentelemetry import metrics

from chassis.backoff import Backoff
from chassis.bus.dead_letters import is_discarded, names_set_aside
from chassis.bus.outbox import Outbox
from chassis.bus.subjects import subject_of
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.rounds import run_rounds
from finemesh.events.v1 import tuning_events_pb2
from services.billing.budgets.review import review_spending
from services.billing.config import BillingSettings
from services.billing.holds.convert import expired_hold_to_proto
from services.billing.holds.hold import Hold
from services.billing.holds.holding import settle_hold
from services.billing.holds.store import HoldStore
from services.billing.ledger import entries
from services.billing.ledger.store import LedgerStore, Standing
from services.billing.prices.catalogue import Catalogue

_END = subject_of(tuning_events_pb2.TuningJobEnded)
_log = structlog.get_logger(__name__)
_overdue = metrics.get_meter(__name__).create_gauge("billing.holds_overdue", unit="{hold}")


class Word(enum.Enum):
    """What the scheduler says of a job of which nothing more will be published."""

    ENDED = enum.auto()
    UNKNOWN = enum.auto()


class Expiry:
    """Ends overdue holds: by what is booked if the job's ending is known, whole if there is no such job."""

    def __init__(self, pool: Pool, catalogue: Catalogue, outbox: Outbox, *, consumer: str, clock: Clock) -> None:
        """`consumer` is the name under which this service sets events aside."""
        self._pool = pool
        self._catalogue = catalogue
        self._outbox = outbox
        self._consumer = consumer
        self._clock = clock

    async def end(self, words: Mapping[str, Word]) -> list[str]:
        """The caller knows that everything published before the word was given is handled. Returns what stays open."""
        still_open = []
        for resource, word in sorted(words.items()):
            async with transaction(self._pool) as connection:
                why = await self._end(connection, resource, word)
            self._outbox.wake()
            if why:
                _log.warning("hold_stays", resource=resource, why=why)
                still_open.append(resource)
        return still_open

    async def _end(self, connection: Connection, resource: str, word: Word) -> str:
        """Empty when nothing is held any more, else why the hold stays."""
        holds = HoldStore(connection)
        now = self._clock.now()
        await holds.lock_job(resource)
        hold = await holds.get(resource)
        if hold is None:
            return ""
        # Before the hold: a renewal locks many holds, and a settlement one when it has its organization already.
        standings = await LedgerStore(connection).lock([hold.organization_id])
        if not await holds.lock_expired(resource):
            hold = await holds.get(resource)
            return "renewed" if hold is not None and hold.is_open else ""
        if await names_set_aside(connection, self._consumer, [resource]):
            return "event_set_aside"
        ending = await holds.get_ending(resource)
        if ending is None:
            if word is Word.ENDED and not await is_discarded(connection, self._consumer, name=resource, subject=_END):
                # Its end was published and never came: a release would make a gift of what it did.
                return "end_lost"
            await self._release(connection, hold, standings, now)
            return ""
        totals = await holds.get_job_totals(resource)
        missing = ending.usage_record_count - totals.record_count
        note = f"{missing} of {ending.usage_record_count} usage records did not come before the hold expired"
        await settle_hold(connection, self._catalogue, hold, ending, totals, now, note=note)
        await review_spending(connection, self._outbox, [hold.organization_id], now, spenders=[hold.spender])
        return ""

    async def _release(self, connection: Connection, hold: Hold, standings: dict[str, Standing], now: datetime) -> None:
        """There is no such job, or a person gave up the event of its end: it owes nothing, whatever was booked."""
        holds = HoldStore(connection)
        entry = entries.release(
            organization_id=hold.organization_id,
            resource=hold.resource,
            held_nanos_usd=hold.held_nanos_usd,
            price_book_version=hold.price_book_version,
            now=now,
        )
        # Its work stays booked and is worth nothing: what a report adds up over the job must be what it paid.
        worth = (await holds.get_job_totals(hold.resource)).amount_nanos_usd
        ended = await holds.end(hold.resource, "expire", end_time=now, adjustment_nanos_usd=-worth)
        assert ended, "the job and its hold are locked"
        await LedgerStore(connection).post(standings, [entry] if entry else [])
        await self._outbox.add(connection, expired_hold_to_proto(hold, now), subject_name=hold.resource)
        await review_spending(connection, self._outbox, [hold.organization_id], now, spenders=[hold.spender])
        _log.warning(
            "hold_expired", resource=hold.resource, released_nanos_usd=hold.held_nanos_usd, worth_nanos_usd=worth
        )


class OverdueWatch:
    """Warns while holds are overdue, for only the scheduler can tell what becomes of them. It ends none."""

    def __init__(self, pool: Pool, settings: BillingSettings, *, clock: Clock) -> None:
        self._pool = pool
        self._settings = settings
        self._clock = clock

    async def run(self) -> None:
        """Looks until cancelled; a database that is away is waited for."""
        settings = self._settings
        await run_rounds(
            "overdue_watch",
            self.look,
            wait=lambda: self._clock.sleep(settings.hold_overdue_interval_s),
            clock=self._clock,
            backoff=Backoff(first_s=settings.reconnect_backoff_s_min, last_s=settings.reconnect_backoff_s_max),
        )

    async def look(self) -> None:
        async with self._pool.acquire() as connection:
            overdue = await HoldStore(connection).count_expired()
        _overdue.set(overdue.hold_count)
        if overdue.hold_count:
            _log.warning("holds_overdue", holds=overdue.hold_count, held_nanos_usd=overdue.held_nanos_usd)
