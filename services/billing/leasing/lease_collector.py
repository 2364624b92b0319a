"""Ends leases whose holder is gone, and forgets closed ones whose usage never came. Not pure: database."""

from datetime import timedelta

import structlog

from chassis.clock import Clock
from chassis.db.pool import Pool
from chassis.rounds import run_rounds
from services.billing.config import BillingSettings
from services.billing.leasing.store import LeaseStore

_log = structlog.get_logger(__name__)


# Part of a lifetime in which a holder that can reach billing renews many times.
QUIET_SHARE = 0.1


class LeaseCollector:
    """While billing was away nobody could renew, so at its start every holder gets a whole lifetime."""

    def __init__(self, pool: Pool, settings: BillingSettings, *, clock: Clock) -> None:
        self._pool = pool
        self._lifetime = timedelta(seconds=settings.credit_lease_s)
        self._late = settings.credit_late_usage
        self._interval_s = settings.credit_collect_interval_s
        self._clock = clock

    async def begin(self) -> None:
        """Must come before the first grant or hold of the process. Does nothing where another one serves holders."""
        async with self._pool.acquire() as connection:
            await LeaseStore(connection).renew_all_holders(self._lifetime, self._lifetime * QUIET_SHARE)

    async def run(self) -> None:
        await run_rounds("lease_collector", self.collect, wait=self._pause, clock=self._clock)

    async def collect(self) -> None:
        """One look. Holders go first and on their own: one that renews later is told that it was forgotten."""
        async with self._pool.acquire() as connection:
            leases = LeaseStore(connection)
            for holder in await leases.delete_expired_holders():
                _log.warning("lease_holder_gone", holder=holder)
            await leases.delete_orphans(self._late)

    async def _pause(self) -> None:
        await self._clock.sleep(self._interval_s)
