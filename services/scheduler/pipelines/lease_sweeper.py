"""Not pure: database. Ends what nobody renews: silent nodes, and leases and allocations whose time is over.

Their jobs go on elsewhere. It judges only after it has watched long enough itself: a scheduler that was away must not
punish nodes for its absence.
"""

from datetime import datetime

import structlog

from chassis.clock import Clock
from chassis.rounds import AbsenceGuard, ClockWatch, FailingItems, run_rounds
from services.scheduler.attempts.attempt import Lease
from services.scheduler.attempts.attempts import Attempts
from services.scheduler.attempts.store import AttemptStore
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.store import JobStore
from services.scheduler.nodes.registry import NodeRegistry
from services.scheduler.nodes.store import NodeStore
from services.scheduler.placement.store import AllocationStore
from services.scheduler.watching.hub import QUEUE_TOPIC

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
        self._clock_watch = ClockWatch(settings.clock_jump_s_max)
        self._failing = FailingItems("sweeper", clock)

    async def run(self) -> None:
        await run_rounds(
            "sweeper", self.sweep, wait=lambda: self._clock.sleep(self._settings.sweep_interval_s), clock=self._clock
        )

    async def sweep(self) -> bool:
        # Read first: only a look that reached the database counts as a look. All of it is judged by this one time.
        at = await AllocationStore(self._database.pool).time()
        self._absence.look()
        if self._clock_watch.has_jumped(at, self._clock.monotonic()):
            log.warning(
                "database_clock_jumped",
                detail="leases are judged again after one whole lease, and no job waits any longer",
            )
            self._absence.begin_anew()
            async with self._database.writing() as connection:
                await JobStore(connection).end_pauses(self._settings.claim_duration_s)
                self._database.ring(QUEUE_TOPIC)
        await self._quarantine()
        if not self._absence.may_judge:
            return False
        async with self._database.writing() as connection:
            lost = await self._nodes.lose_silent(connection, at=at, silence_s_max=self._settings.lease_duration_s)
        if lost:
            log.warning("nodes_lost", nodes=lost)
        expired = await AttemptStore(self._database.pool).list_expired(at, EXPIRED_BATCH_MAX)
        tried = [lease for lease in expired if not self._failing.leaves_alone(_item(lease))]
        for lease in tried:
            with self._failing.trying(_item(lease)):
                await self._end(lease, at)
        return len(expired) == EXPIRED_BATCH_MAX and bool(tried)

    async def _quarantine(self) -> None:
        """Nodes on which most jobs fail get none for a while: one that fails fast would take the whole queue."""
        settings = self._settings
        async with self._database.writing() as connection:
            found = await NodeStore(connection).quarantine(
                window_s=settings.quarantine_window_s,
                jobs_min=settings.quarantine_jobs_min,
                share_min=settings.quarantine_share_min,
                duration_s=settings.quarantine_duration_s,
            )
        for node, reason in found.items():
            log.error("node_quarantined", node=node, reason=reason)

    async def _end(self, lease: Lease, at: datetime) -> None:
        async with self._database.writing() as connection:
            if lease.ref is not None:
                why = "the node was lost, lost its lease, or made no progress for too long"
                ended = await self._attempts.lose(connection, lease.ref, why, lease.lease_token, at=at)
            else:
                ended = await AllocationStore(connection).release_expired(
                    lease.lease_token, at=at, now=self._database.now()
                )
            if ended:
                self._database.ring(QUEUE_TOPIC)
        if ended:
            log.warning("lease_ended", owner=lease.owner, lease_token=lease.lease_token)


def _item(lease: Lease) -> str:
    return f"{lease.owner} {lease.lease_token}"
