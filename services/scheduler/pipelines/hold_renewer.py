"""Not pure: database, gRPC. Keeps the holds of unfinished jobs alive, says which others have nothing more to come, and
ends the jobs whose hold is over.

A billing service that is away is asked again soon: no job ends because of the time of its absence.
"""

import structlog

from chassis.clock import Clock
from chassis.errors import DomainError
from chassis.rounds import FailingItems, run_rounds
from finemesh.holds.v1 import hold_service_pb2
from services.scheduler.admission import peer_errors
from services.scheduler.attempts.attempts import Attempts
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.convert import job_name, job_ref
from services.scheduler.peers import Peers
from services.scheduler.pipelines.store import ClaimStore

WHY = "the hold on its price ended because it was not renewed in time; nothing is charged, create the job again"
log = structlog.get_logger(__name__)


class Renewer:
    def __init__(
        self, database: Database, attempts: Attempts, peers: Peers, clock: Clock, settings: SchedulerSettings
    ) -> None:
        self._database = database
        self._attempts = attempts
        self._peers = peers
        self._clock = clock
        self._settings = settings
        self._failures = 0
        self._failing = FailingItems("renewer", clock)
        self.pause_s = settings.hold_renewal_interval_s

    async def run(self) -> None:
        await run_rounds("renewer", self.renew_all, wait=lambda: self._clock.sleep(self.pause_s), clock=self._clock)

    async def renew_all(self) -> bool:
        """One renewal of everything that is held; always False, for the next one has time."""
        try:
            await self._renew()
            await self._end_overdue()
        except DomainError as error:
            self._failures += 1
            self.pause_s = peer_errors.waiting_of(error, "billing", self._failures).delay_s
            log.warning("hold_renewal_postponed", error=str(error), failures=self._failures)
            return False
        self._failures, self.pause_s = 0, self._settings.hold_renewal_interval_s
        return False

    async def _renew(self) -> None:
        after, batch_max = "", self._settings.hold_renewal_batch_max
        while True:
            refs = await ClaimStore(self._database.pool).list_holding(after, batch_max)
            if not refs:
                return
            jobs = {job_name(ref): ref for ref in refs}
            request = hold_service_pb2.RenewHoldsRequest(resources=list(jobs))
            answer = await self._peers.holds.RenewHolds(request, timeout=self._settings.peer_deadline_s)
            for resource in answer.ended_resources:
                # A job that fails by a defect is tried again at the next renewal, and holds up no other.
                with self._failing.trying(resource):
                    # The list may be older than the job's end: then there is nothing left to end.
                    if await self._attempts.expire(jobs[resource], WHY):
                        log.error("job_ended_with_its_hold", job=resource)
            after = refs[-1].job_id

    async def _end_overdue(self) -> None:
        """Gives billing this scheduler's word on each overdue hold. Of an unfinished job it says nothing."""
        token, timeout = "", self._settings.peer_deadline_s
        while True:
            page = await self._peers.holds.ListOverdueHolds(
                hold_service_pb2.ListOverdueHoldsRequest(
                    page_size=self._settings.hold_renewal_batch_max, page_token=token
                ),
                timeout=timeout,
            )
            refs = {}
            for resource in page.resources:
                with self._failing.trying(resource):
                    refs[job_ref(resource)] = resource
            # Read before billing looks at what it has not handled yet, so that no event is in neither place.
            told = await ClaimStore(self._database.pool).list_fates(list(refs))
            ended = [resource for ref, resource in refs.items() if told.get(ref)]
            unknown = [resource for ref, resource in refs.items() if ref not in told]
            if ended or unknown:
                request = hold_service_pb2.EndHoldsRequest(ended_resources=ended, unknown_resources=unknown)
                answer = await self._peers.holds.EndHolds(request, timeout=timeout)
                log.warning("overdue_holds_told", ended=ended, unknown=unknown, still_open=list(answer.open_resources))
            if not page.next_page_token:
                return
            token = page.next_page_token
