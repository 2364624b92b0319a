"""VALIDATING -> analysed, priced, held -> QUEUED, or refused. Load, process without a transaction, apply guarded by the claim.

Any number of workers in any number of processes may run it: an answer whose claim was lost meanwhile is dropped.
"""

import asyncio
from datetime import timedelta

import structlog

from chassis.clock import Clock
from chassis.db.queries import affected
from chassis.errors import DomainError
from chassis.ids import Ids
from finemesh.holds.v1 import hold_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler import refusal
from services.scheduler.analysis import Analyzer, Inputs
from services.scheduler.attempts import failed_ending
from services.scheduler.config import SchedulerSettings
from services.scheduler.convert import artifact_from, failure_to
from services.scheduler.convert_spec import spec_from
from services.scheduler.domain import ClaimedJob, JobFailure
from services.scheduler.job_store import JobStore, resource_name
from services.scheduler.lifecycle import JobTransition
from services.scheduler.peers import Peers
from services.scheduler.price_request import price_request
from services.scheduler.rounds import run_rounds
from services.scheduler.store import QUERIES, QUEUE_TOPIC, Store, job_topic, notify
from services.scheduler.watch import Hub

log = structlog.get_logger(__name__)


class _ClaimLost(Exception):
    """Somebody else has the job now, or it is not VALIDATING any more."""


class Validator:
    def __init__(
        self,
        store: Store,
        jobs: JobStore,
        analyzer: Analyzer,
        peers: Peers,
        hub: Hub,
        clock: Clock,
        ids: Ids,
        settings: SchedulerSettings,
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._analyzer = analyzer
        self._peers = peers
        self._hub = hub
        self._clock = clock
        self._ids = ids
        self._settings = settings

    async def run(self) -> None:
        with self._hub.listening(QUEUE_TOPIC) as bell:
            await run_rounds(
                "validator", self.validate_one, lambda: bell.wait(self._settings.pipeline_poll_s), self._clock
            )

    async def validate_one(self) -> bool:
        """Takes one job through; False when none waits."""
        job = await self._claim()
        if job is None:
            return False
        try:
            await self._while_claimed(job)
        except _ClaimLost:
            log.info("job went on without this worker", job=job.job_id)
            await QUERIES.free_claim(self._store.pool, project_id=job.project_id, job_id=job.job_id, claim=job.claim)
        return True

    async def _claim(self) -> ClaimedJob | None:
        claim, now = self._ids.uuid(), self._store.now()
        row = await QUERIES.claim_validating(self._store.pool, claim=claim, until=self._until(), now=now)
        return None if row is None else ClaimedJob(**row, claim=claim)

    async def _while_claimed(self, job: ClaimedJob) -> None:
        """Works and renews the claim side by side; a lost claim stops the work."""
        work = asyncio.create_task(self._work(job))
        keeper = asyncio.create_task(self._keep_claim(job))
        try:
            done, _ = await asyncio.wait({work, keeper}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, keeper):
                task.cancel()
            await asyncio.gather(work, keeper, return_exceptions=True)
        # The work's own answer counts, even if the claim was lost in the same moment: what it applied was guarded.
        await (work if work in done else keeper)

    async def _keep_claim(self, job: ClaimedJob) -> None:
        while True:
            await self._clock.sleep(self._settings.claim_duration_s / 3)
            status = await QUERIES.renew_claim(
                self._store.pool,
                project_id=job.project_id,
                job_id=job.job_id,
                claim=job.claim,
                until=self._until(),
            )
            if affected(status) == 0:
                raise _ClaimLost

    async def _work(self, job: ClaimedJob) -> None:
        spec = spec_from(tuning_job_pb2.TuningSpec.FromString(job.spec))
        inputs = Inputs(
            base_model=artifact_from(job.base_artifact),
            base_revision=job.base_revision,
            training_file=artifact_from(job.training_artifact),
            validation_file=None if job.validation_artifact is None else artifact_from(job.validation_artifact),
        )
        service = "a trainer"
        try:
            counts = await self._analyzer.counts(spec, inputs)
            service = "billing"
            request = hold_service_pb2.CreateHoldRequest(
                resource=resource_name(job),
                organization_id=job.organization_id,
                project_id=job.project_id,
                price=price_request(spec, counts, job.parameter_count),
                api_key_id=job.api_key_id,
            )
            held = await self._hold(job, request)
        except DomainError as error:
            await self._apply_error(job, error, service)
            return
        await self._apply_held(job, counts, held)

    async def _hold(
        self, job: ClaimedJob, request: hold_service_pb2.CreateHoldRequest
    ) -> hold_service_pb2.CreateHoldResponse:
        """From the mark on, a cancellation knows that a hold may exist, and sees to it that it is released."""
        status = await QUERIES.request_hold(
            self._store.pool, project_id=job.project_id, job_id=job.job_id, claim=job.claim
        )
        if affected(status) == 0:
            raise _ClaimLost
        return await self._peers.holds.CreateHold(request, timeout=self._settings.peer_deadline_s)

    async def _apply_held(
        self, job: ClaimedJob, counts: tuning_job_pb2.DatasetCounts, held: hold_service_pb2.CreateHoldResponse
    ) -> None:
        message = (
            f"{counts.training_tokens} training tokens per epoch; "
            f"${held.quote.total_nanos_usd / 1e9:.2f} held; waits for GPUs"
        )
        async with self._store.writing() as connection:
            change = await self._jobs.transition(
                connection,
                JobTransition.HELD,
                job,
                message,
                claim=job.claim,
                counts=counts.SerializeToString(deterministic=True),
                quoted_nanos_usd=held.quote.total_nanos_usd,
                price_book_version=held.quote.price_book_version,
                hold_id=held.hold_id,
            )
        if change is None:
            raise _ClaimLost

    async def _apply_error(self, job: ClaimedJob, error: DomainError, service: str) -> None:
        failures = job.service_failures + 1
        verdict = refusal.verdict_of(error)
        if verdict is refusal.Verdict.DOUBT and failures >= self._settings.attempts_max:
            verdict = refusal.Verdict.REFUSE
        if verdict is refusal.Verdict.REFUSE:
            await self._apply_refusal(job, refusal.failure_of(error))
            return
        waiting = refusal.waiting_of(error, service, failures)
        log.warning("validation waits", job=job.job_id, service=service, error=str(error), failures=failures)
        async with self._store.writing() as connection:
            status = await QUERIES.postpone_job(
                connection,
                project_id=job.project_id,
                job_id=job.job_id,
                claim=job.claim,
                wake_at=self._store.now() + timedelta(seconds=waiting.delay_s),
                waiting_message=waiting.message,
                now=self._store.now(),
            )
            await notify(connection, job_topic(job.job_id))
        if affected(status) == 0:
            raise _ClaimLost

    async def _apply_refusal(self, job: ClaimedJob, failure: JobFailure) -> None:
        async with self._store.writing() as connection:
            change = await self._jobs.transition(
                connection,
                JobTransition.REFUSE,
                job,
                f"refused: {failure.message}",
                claim=job.claim,
                error=failure_to(failure),
            )
            if change is None:
                raise _ClaimLost
            await self._jobs.end(connection, change, failed_ending(change, failure))

    def _until(self) -> object:
        return self._store.now() + timedelta(seconds=self._settings.claim_duration_s)
