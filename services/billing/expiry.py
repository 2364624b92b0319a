"""The end of holds that nobody renews: what a job's scheduler forgot must not keep its owner's money for ever.

It judges only after it has watched long enough itself: while billing was away, nobody could renew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import structlog

from chassis.backoff import Backoff
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, database_is_away, transaction
from chassis.db.queries import load_queries
from services.billing import booking, convert_budgets, ledger, spending, store, usage_store
from services.billing.config import BillingSettings
from services.billing.pricebook import Shelf
from services.billing.records import Hold
from services.billing.store import Standing

# A gap of a few looks is a busy machine; a longer one is an absence, in which renewals went unheard.
LOOKS_MISSED_MAX = 4
_log = structlog.get_logger(__name__)
_queries = load_queries(Path(__file__).parent / "queries_expiry.sql")


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


async def renew_holds(connection: Connection, resources: Sequence[str], until: datetime) -> list[str]:
    """Puts off the end of these holds; returns the jobs whose hold is over or never was."""
    renewed = {row["resource"] async for row in _queries.renew_holds(connection, resources=resources, until=until)}
    return [resource for resource in dict.fromkeys(resources) if resource not in renewed]


class Sweeper:
    """Ends holds whose time is over: by what is booked if the job's ending is known, else by giving all of it back."""

    def __init__(self, pool: Pool, shelf: Shelf, outbox: Outbox, settings: BillingSettings, *, clock: Clock) -> None:
        self._pool = pool
        self._shelf = shelf
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
            rows = _queries.list_expired_holds(connection, now=self._clock.now(), row_max=settings.hold_sweep_batch_max)
            resources = [row["resource"] async for row in rows]
        self._watch = self._watch.look(self._clock.monotonic(), settings.hold_sweep_interval_s * LOOKS_MISSED_MAX)
        if not self._watch.may_judge(settings.hold_grace_s):
            return False
        for resource in resources:
            async with transaction(self._pool) as connection:
                await self._end(connection, resource)
            self._outbox.wake()
        return len(resources) == settings.hold_sweep_batch_max

    async def _end(self, connection: Connection, resource: str) -> None:
        now = self._clock.now()
        await store.lock_job(connection, resource)
        hold = await store.get_hold(connection, resource)
        assert hold is not None, "holds are never deleted"
        # Before the hold: a renewal locks many holds, and a settlement one when it has its organization already.
        standings = await store.lock_organizations(connection, [hold.organization_id])
        if await _queries.lock_expired_hold(connection, resource=resource, now=now) is None:
            return
        ending = await store.get_job_ending(connection, resource)
        if ending is None:
            await self._release(connection, hold, standings, now)
            return
        totals = await usage_store.get_job_totals(connection, resource)
        missing = ending.usage_record_count - totals.record_count
        note = f"{missing} of {ending.usage_record_count} usage records did not come before the hold expired"
        await booking.settle(connection, self._shelf, hold, ending, totals, now, note=note)
        await spending.review(connection, self._outbox, [hold.organization_id], now, spenders=[hold.spender])

    async def _release(self, connection: Connection, hold: Hold, standings: dict[str, Standing], now: datetime) -> None:
        """Nobody said how the job ended: it owes nothing, whatever it did."""
        entry = ledger.release(
            organization_id=hold.organization_id,
            resource=hold.resource,
            held_nanos_usd=hold.held_nanos_usd,
            price_book_version=hold.price_book_version,
            now=now,
        )
        # Its work stays booked and is worth nothing: what a report adds up over the job must be what it paid.
        worth = (await usage_store.get_job_totals(connection, hold.resource)).amount_nanos_usd
        ended = await store.end_hold(connection, hold.resource, "expire", end_time=now, adjustment_nanos_usd=-worth)
        assert ended, "the job and its hold are locked"
        await store.post(connection, standings, [entry] if entry else [])
        await self._outbox.add(connection, convert_budgets.to_expired_event(hold, now), subject_name=hold.resource)
        await spending.review(connection, self._outbox, [hold.organization_id], now, spenders=[hold.spender])
        _log.warning("hold_expired", resource=hold.resource, released_nanos_usd=hold.held_nanos_usd)
