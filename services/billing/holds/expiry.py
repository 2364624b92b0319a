"""Ends holds that nobody renews. Not pure: database, bus.

What a job's scheduler forgot must not keep its owner's money for ever. It judges only after it has watched long enough
itself: while billing was away, nobody could renew.
"""

from dataclasses import dataclass
from datetime import datetime

import structlog

from chassis.backoff import Backoff
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, database_is_away, transaction
from services.billing.budgets.review import review_spending
from services.billing.config import BillingSettings
from services.billing.holds.convert import expired_hold_to_proto
from services.billing.holds.hold import Hold
from services.billing.holds.holding import settle_hold
from services.billing.holds.store import HoldStore
from services.billing.ledger import entries
from services.billing.ledger.store import LedgerStore, Standing
from services.billing.prices.catalogue import Catalogue

# A gap of a few looks is a busy machine; a longer one is an absence, in which renewals went unheard.
LOOKS_MISSED_MAX = 4
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Since when billing could be asked to renew holds without a gap, on the monotonic clock."""

    since_s: float
    last_s: float

    @staticmethod
    def begin(now_s: float) -> "Watch":
        return Watch(since_s=now_s, last_s=now_s)

    def look(self, now_s: float, gap_s_max: float) -> "Watch":
        """Called at each look that reached the database; a longer gap between two looks begins the watch anew."""
        if now_s - self.last_s > gap_s_max:
            return Watch.begin(now_s)
        return Watch(since_s=self.since_s, last_s=now_s)

    def may_judge(self, grace_s: float) -> bool:
        return self.last_s - self.since_s >= grace_s


class Sweeper:
    """Ends holds whose time is over: by what is booked if the job's ending is known, else by giving all of it back."""

    def __init__(
        self, pool: Pool, catalogue: Catalogue, outbox: Outbox, settings: BillingSettings, *, clock: Clock
    ) -> None:
        self._pool = pool
        self._catalogue = catalogue
        self._outbox = outbox
        self._settings = settings
        self._clock = clock
        self._watch = Watch.begin(clock.monotonic())

    async def run(self) -> None:
        """Sweeps until cancelled; a database that is away is waited for."""
        settings = self._settings
        backoff = Backoff(first_s=settings.reconnect_backoff_s_min, last_s=settings.reconnect_backoff_s_max)
        while True:
            try:
                more = await self.sweep()
            except Exception as error:
                if not database_is_away(error):
                    raise
                _log.warning("sweeper_waits", error=repr(error))
                await self._clock.sleep(backoff.next_s())
                continue
            backoff.reset()
            if not more:
                await self._clock.sleep(settings.hold_sweep_interval_s)

    async def sweep(self) -> bool:
        """One look; True when there may be more to end at once."""
        settings = self._settings
        async with self._pool.acquire() as connection:
            resources = await HoldStore(connection).list_expired(
                self._clock.now(), row_max=settings.hold_sweep_batch_max
            )
        self._watch = self._watch.look(self._clock.monotonic(), settings.hold_sweep_interval_s * LOOKS_MISSED_MAX)
        if not self._watch.may_judge(settings.hold_grace_s):
            return False
        for resource in resources:
            async with transaction(self._pool) as connection:
                await self._end(connection, resource)
            self._outbox.wake()
        return len(resources) == settings.hold_sweep_batch_max

    async def _end(self, connection: Connection, resource: str) -> None:
        holds = HoldStore(connection)
        now = self._clock.now()
        await holds.lock_job(resource)
        hold = await holds.get(resource)
        assert hold is not None, "holds are never deleted"
        # Before the hold: a renewal locks many holds, and a settlement one when it has its organization already.
        standings = await LedgerStore(connection).lock([hold.organization_id])
        if not await holds.lock_expired(resource, now):
            return
        ending = await holds.get_ending(resource)
        if ending is None:
            await self._release(connection, hold, standings, now)
            return
        totals = await holds.get_job_totals(resource)
        missing = ending.usage_record_count - totals.record_count
        note = f"{missing} of {ending.usage_record_count} usage records did not come before the hold expired"
        await settle_hold(connection, self._catalogue, hold, ending, totals, now, note=note)
        await review_spending(connection, self._outbox, [hold.organization_id], now, spenders=[hold.spender])

    async def _release(self, connection: Connection, hold: Hold, standings: dict[str, Standing], now: datetime) -> None:
        """Nobody said how the job ended: it owes nothing, whatever it did."""
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
        _log.warning("hold_expired", resource=hold.resource, released_nanos_usd=hold.held_nanos_usd)
