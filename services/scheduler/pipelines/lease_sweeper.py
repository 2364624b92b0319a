"""Not pure: database. Ends what nobody renews: silent nodes, and leases and allocations whose time is over.

Their jobs go on elsewhere. It judges only after it has watched long enough itself: a scheduler that was away must not
punish nodes for its absence.
"""

from datetime import timedelta

import structlog

from chassis.clock import Clock
from chassis.rounds import AbsenceGuard, run_rounds
from services.scheduler.attempts.attempt import Lease
from services.scheduler.attempts.attempts import Attempts
from services.scheduler.attempts.store import AttemptStore
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.nodes.registry import NodeRegistry
from services.scheduler.placement.store import AllocationStore
from services.scheduler.watching.hub import QUEUE_TOPIC
from services.scheduler.watching.store import NotificationStore

EXPIRED_BATCH_MAX = 500
log = structlog.get_logger(__name__)


class Sweeper:
    def __init__(
        self, database: Database, nodes: NodeRegistry, attempts: Attempts, clock: Clock, settings: SchedulerSettings
    ) -> None:
        self._database = database
        self._nodes = nodes
        self._attempts = attempts
        self._clock = clock
        self._settings = settings
        duration_s = settings.lease_duration_s
        self._absence = AbsenceGuard(clock, gap_s_max=duration_s / 2, watch_s_min=duration_s)

    async def run(self) -> None:
        await run_rounds(
            "sweeper", self.sweep, wait=lambda: self._clock.sleep(self._settings.sweep_interval_s), clock=self._clock
        )

    async def sweep(self) -> bool:
        # Read first: only a look that reached the database counts as a look.
        expired = await self._list_expired()
        self._absence.look()
        if not self._absence.may_judge:
            return False
        async with self._database.writing() as connection:
            silent_since = self._database.now() - timedelta(seconds=self._settings.lease_duration_s)
            lost = await self._nodes.lose_silent(connection, silent_since)
        if lost:
            log.warning("nodes_lost", nodes=lost)
            expired = await self._list_expired()
        for lease in expired:
            await self._end(lease)
        return len(expired) == EXPIRED_BATCH_MAX

    async def _list_expired(self) -> list[Lease]:
        return await AttemptStore(self._database.pool).list_expired(self._database.now(), EXPIRED_BATCH_MAX)

    async def _end(self, lease: Lease) -> None:
        async with self._database.writing() as connection:
            if lease.ref is not None:
                why = "the node was lost, or lost its lease"
                ended = await self._attempts.lose(connection, lease.ref, why, lease.lease_token)
            else:
                ended = await AllocationStore(connection).release_expired(lease.lease_token, self._database.now())
            if ended:
                await NotificationStore(connection).notify(QUEUE_TOPIC)
        if ended:
            log.warning("lease_ended", owner=lease.owner, lease_token=lease.lease_token)
