"""Releases holds that a cancelled or refused job may have left behind: asked for, but without an answer that was stored.

A job is taken only when no validator can still be asking for its hold, so the release is the last word.
"""

from datetime import timedelta

import structlog

from chassis.clock import Clock
from chassis.errors import DomainError
from chassis.ids import Ids
from finemesh.holds.v1 import hold_service_pb2
from services.scheduler import refusal
from services.scheduler.config import SchedulerSettings
from services.scheduler.domain import JobRef
from services.scheduler.job_store import resource_name
from services.scheduler.peers import Peers
from services.scheduler.rounds import run_rounds
from services.scheduler.store import QUERIES, Store

log = structlog.get_logger(__name__)


class Releaser:
    def __init__(self, store: Store, peers: Peers, clock: Clock, ids: Ids, settings: SchedulerSettings) -> None:
        self._store = store
        self._peers = peers
        self._clock = clock
        self._ids = ids
        self._settings = settings

    async def run(self) -> None:
        await run_rounds(
            "releaser", self.release_one, lambda: self._clock.sleep(self._settings.pipeline_poll_s), self._clock
        )

    async def release_one(self) -> bool:
        """Releases one hold; False when none waits."""
        claim, now = self._ids.uuid(), self._store.now()
        until = now + timedelta(seconds=self._settings.claim_duration_s)
        row = await QUERIES.claim_release(self._store.pool, claim=claim, until=until, now=now)
        if row is None:
            return False
        ref = JobRef(project_id=row["project_id"], job_id=row["job_id"])
        request = hold_service_pb2.ReleaseHoldRequest(resource=resource_name(ref))
        try:
            await self._peers.holds.ReleaseHold(request, timeout=self._settings.peer_deadline_s)
        except DomainError as error:
            # Whatever billing says, money must not stay held for a job that is over: ask again until it agrees.
            waiting = refusal.waiting_of(error, "billing", row["service_failures"] + 1)
            log.warning("release waits", job=ref.job_id, error=str(error))
            wake_at = self._store.now() + timedelta(seconds=waiting.delay_s)
            await QUERIES.postpone_job(
                self._store.pool, **vars(ref), claim=claim, wake_at=wake_at, waiting_message="", now=self._store.now()
            )
            return True
        await QUERIES.finish_release(self._store.pool, **vars(ref), claim=claim)
        return True
