"""Ends what nobody renews: nodes that fell silent, leases and allocations whose time is over. Their jobs go on elsewhere.

It judges only after it has watched long enough itself: a scheduler that was away must not punish nodes for its absence.
"""

from datetime import timedelta

import structlog

from chassis.clock import Clock
from services.scheduler import lease_store, leases
from services.scheduler.attempts import Attempts
from services.scheduler.config import SchedulerSettings
from services.scheduler.lease_store import ExpiredLease
from services.scheduler.node_store import NodeStore
from services.scheduler.rounds import run_rounds
from services.scheduler.store import QUEUE_TOPIC, Store, notify

EXPIRED_BATCH_MAX = 500
log = structlog.get_logger(__name__)


class Sweeper:
    def __init__(
        self, store: Store, nodes: NodeStore, attempts: Attempts, clock: Clock, settings: SchedulerSettings
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._attempts = attempts
        self._clock = clock
        self._settings = settings
        self._sight = leases.Sight.begin(clock.monotonic())

    async def run(self) -> None:
        await run_rounds("sweeper", self.sweep, lambda: self._clock.sleep(self._settings.sweep_interval_s), self._clock)

    async def sweep(self) -> bool:
        duration_s = self._settings.lease_duration_s
        # Read first: only a look that reached the database counts as a look.
        expired = await lease_store.list_expired(self._store.pool, self._store.now(), EXPIRED_BATCH_MAX)
        self._sight = self._sight.look(self._clock.monotonic(), duration_s)
        if not self._sight.may_judge(duration_s):
            return False
        async with self._store.writing() as connection:
            silent_since = self._store.now() - timedelta(seconds=duration_s)
            lost = await self._nodes.lose_silent(connection, silent_since)
        if lost:
            log.warning("nodes lost", nodes=lost)
            expired = await lease_store.list_expired(self._store.pool, self._store.now(), EXPIRED_BATCH_MAX)
        for lease in expired:
            await self._end(lease)
        return len(expired) == EXPIRED_BATCH_MAX

    async def _end(self, lease: ExpiredLease) -> None:
        async with self._store.writing() as connection:
            if lease.ref is not None:
                why = "the node was lost, or lost its lease"
                ended = await self._attempts.lose(connection, lease.ref, why, lease.lease_token)
            else:
                ended = await lease_store.release_expired(connection, lease.lease_token, self._store.now())
            if ended:
                await notify(connection, QUEUE_TOPIC)
        if ended:
            log.warning("lease ended", owner=lease.owner, lease_token=lease.lease_token)
