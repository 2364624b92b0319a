"""Not pure: database, gRPC. Releases holds that a cancelled or refused job may have left behind.

Those are holds that were asked for while the answer was never stored. A job is taken only when no validator can still
be asking for its hold, so the release is the last word.
"""

import structlog

from chassis.clock import Clock
from chassis.db.pool import database_is_away
from chassis.errors import DomainError, Internal
from chassis.ids import Ids
from chassis.rounds import run_rounds
from finemesh.holds.v1 import hold_service_pb2
from services.scheduler.admission import peer_errors
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.convert import job_name
from services.scheduler.peers import Peers
from services.scheduler.pipelines.store import ClaimStore

log = structlog.get_logger(__name__)


class Releaser:
    def __init__(self, database: Database, peers: Peers, clock: Clock, ids: Ids, settings: SchedulerSettings) -> None:
        self._database = database
        self._peers = peers
        self._clock = clock
        self._ids = ids
        self._settings = settings

    async def run(self) -> None:
        await run_rounds(
            "releaser",
            self.release_one,
            wait=lambda: self._clock.sleep(self._settings.pipeline_poll_s),
            clock=self._clock,
        )

    async def release_one(self) -> bool:
        """Releases one hold; False when none waits."""
        claims = ClaimStore(self._database.pool)
        job = await claims.claim_release(self._ids.uuid(), claim_s=self._settings.claim_duration_s)
        if job is None:
            return False
        request = hold_service_pb2.ReleaseHoldRequest(resource=job_name(job))
        try:
            await self._peers.holds.ReleaseHold(request, timeout=self._settings.peer_deadline_s)
        except Exception as failure:
            if database_is_away(failure):
                raise
            # Whatever billing says, money must not stay held for a job that is over: ask again until it agrees.
            error = failure if isinstance(failure, DomainError) else Internal("INTERNAL", type(failure).__name__)
            waiting = peer_errors.waiting_of(error, "billing", job.service_failures + 1)
            log.warning("hold_release_postponed", job=job.job_id, error=str(error))
            now = self._database.now()
            await claims.postpone(job, delay_s=waiting.delay_s, waiting_message="", now=now)
            return True
        await claims.finish_release(job)
        return True
