"""Ends holds that nobody renews. Not pure: database, bus.

What a job's scheduler forgot must not keep its owner's money for ever. It judges only after it has watched long enough
itself: while billing was away, nobody could renew.
"""

from datetime import datetime

import structlog

from chassis.backoff import Backoff
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.rounds import AbsenceGuard, run_rounds
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
        self._absence = AbsenceGuard(
            clock,
            gap_s_max=settings.hold_sweep_interval_s * LOOKS_MISSED_MAX,
            watch_s_min=settings.hold_grace_s,
        )

    async def run(self) -> None:
        """Sweeps until cancelled; a database that is away is waited for."""
        settings = self._settings
        await run_rounds(
            "hold_sweeper",
            self.sweep,
            wait=lambda: self._clock.sleep(settings.hold_sweep_interval_s),
            clock=self._clock,
            backoff=Backoff(first_s=settings.reconnect_backoff_s_min, last_s=settings.reconnect_backoff_s_max),
        )

    async def sweep(self) -> bool:
        """One look; True when there may be more to end at once."""
        settings = self._settings
        async with self._pool.acquire() as connection:
            resources = await HoldStore(connection).list_expired(
                self._clock.now(), row_max=settings.hold_sweep_batch_max
            )
        self._absence.look()
        if not self._absence.may_judge:
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
