"""Keeps the holds of unfinished jobs alive, and ends a job whose hold is over although nobody ended the job.

A billing service that is away is asked again soon: it judges nobody by the time of its own absence.
"""

import structlog

from chassis.clock import Clock
from chassis.errors import DomainError
from finemesh.holds.v1 import hold_service_pb2
from services.scheduler import job_store, refusal
from services.scheduler.attempts import Attempts
from services.scheduler.config import SchedulerSettings
from services.scheduler.job_store import resource_name
from services.scheduler.peers import Peers
from services.scheduler.rounds import run_rounds
from services.scheduler.store import Store

WHY = "the hold on its price ended because it was not renewed in time; nothing is charged, create the job again"
log = structlog.get_logger(__name__)


class Renewer:
    def __init__(
        self, store: Store, attempts: Attempts, peers: Peers, clock: Clock, settings: SchedulerSettings
    ) -> None:
        self._store = store
        self._attempts = attempts
        self._peers = peers
        self._clock = clock
        self._settings = settings
        self._failures = 0
        self.pause_s = settings.hold_renewal_interval_s

    async def run(self) -> None:
        await run_rounds("renewer", self.renew_all, lambda: self._clock.sleep(self.pause_s), self._clock)

    async def renew_all(self) -> bool:
        """One renewal of everything that is held; always False, for the next one has time."""
        after, batch_max = "", self._settings.hold_renewal_batch_max
        while True:
            refs = await job_store.list_holding(self._store.pool, after, batch_max)
            if not refs:
                break
            jobs = {resource_name(ref): ref for ref in refs}
            request = hold_service_pb2.RenewHoldsRequest(resources=list(jobs))
            try:
                answer = await self._peers.holds.RenewHolds(request, timeout=self._settings.peer_deadline_s)
            except DomainError as error:
                self._failures += 1
                self.pause_s = refusal.waiting_of(error, "billing", self._failures).delay_s
                log.warning("renewal waits", error=str(error), failures=self._failures)
                return False
            for resource in answer.ended_resources:
                # The list may be older than the job's end: then there is nothing left to end.
                if await self._attempts.expire(jobs[resource], WHY):
                    log.error("job ended with its hold", job=resource)
            after = refs[-1].job_id
        self._failures, self.pause_s = 0, self._settings.hold_renewal_interval_s
        return False
