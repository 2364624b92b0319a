"""Not pure: database, gRPC. VALIDATING -> analysed, priced, held -> QUEUED, or refused.

Load, process without a transaction, apply guarded by the claim. Any number of workers in any number of processes may
run it: an answer whose claim was lost meanwhile is dropped.
"""

import asyncio
from contextvars import Context
from uuid import UUID

import structlog

from chassis.clock import Clock
from chassis.db.pool import database_is_away, transaction
from chassis.errors import DomainError, Internal
from chassis.identity import Caller
from chassis.ids import Ids
from chassis.rounds import Signal, run_rounds
from finemesh.holds.v1 import hold_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.admission import peer_errors
from services.scheduler.admission.dataset_counts import Analyzer, Inputs
from services.scheduler.admission.price_request import price_request
from services.scheduler.admission.run_outlook import look_ahead
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.convert import artifact_from_bytes, encoded, failure_to_proto, job_name
from services.scheduler.jobs.endings import JobFailure, failed_ending
from services.scheduler.jobs.lifecycle import JobTransition
from services.scheduler.jobs.transitions import JobTransitions
from services.scheduler.peers import Peers
from services.scheduler.pipelines.store import ClaimStore, ValidationClaim
from services.scheduler.spec.convert import spec_from_proto
from services.scheduler.watching.hub import QUEUE_TOPIC, Hub, job_topic

log = structlog.get_logger(__name__)


class _ClaimLost(Exception):
    """Somebody else has the job now, or it is not VALIDATING any more."""


class Validator:
    def __init__(
        self,
        database: Database,
        jobs: JobTransitions,
        analyzer: Analyzer,
        peers: Peers,
        hub: Hub,
        clock: Clock,
        ids: Ids,
        settings: SchedulerSettings,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._analyzer = analyzer
        self._peers = peers
        self._hub = hub
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._running: dict[UUID, ValidationClaim] = {}

    async def run(self) -> None:
        """Takes jobs as long as there are places, each into a task of its own: none waits for another's giant."""
        async with asyncio.TaskGroup() as group:
            with self._hub.listening(QUEUE_TOPIC) as signal:
                await run_rounds(
                    "validator",
                    lambda: self._begin(group, signal),
                    wait=lambda: signal.wait(self._settings.pipeline_poll_s),
                    clock=self._clock,
                )

    async def _begin(self, group: asyncio.TaskGroup, signal: Signal) -> bool:
        """Claims one job and begins with it; False when none waits, or all places are taken."""
        job = await self.claim()
        if job is None:
            return False
        self._running[job.claim] = job

        def ended(task: asyncio.Task[None]) -> None:
            del self._running[job.claim]
            signal.send()

        # In a context of its own: it holds no connection of this loop.
        group.create_task(self._validate_or_leave(job), context=Context()).add_done_callback(ended)
        return True

    async def _validate_or_leave(self, job: ValidationClaim) -> None:
        """What could not even be set aside is taken again when its claim has run out."""
        try:
            await self.validate(job)
        except Exception as error:
            if database_is_away(error):
                log.warning("validation_interrupted", job=job.job_id, error=repr(error))
            else:
                log.error("validation_left", job=job.job_id, exc_info=error)

    async def validate(self, job: ValidationClaim) -> None:
        """Takes a claimed job through."""
        try:
            await self._while_claimed(job)
        except _ClaimLost:
            log.info("validation_claim_lost", job=job.job_id)
            await ClaimStore(self._database.pool).free(job)
        except Exception as error:
            if database_is_away(error):
                raise
            await self._set_aside(job, error)

    async def _set_aside(self, job: ValidationClaim, error: Exception) -> None:
        """An error that nobody expected is this job's alone: it is tried again a few times, and nobody waits for it."""
        failures = job.service_failures + 1
        log.error("validation_failed", job=job.job_id, failures=failures, exc_info=error)
        try:
            if failures >= self._settings.validation_defects_max:
                why = f"validation failed {failures} times ({type(error).__name__}); nothing is charged"
                await self._apply_refusal(job, JobFailure(reason="INTERNAL", message=why, platform_fault=True))
            else:
                await self._postpone(job, Internal("INTERNAL", "an unexpected error"), "validation", failures)
        except _ClaimLost:
            log.info("validation_claim_lost", job=job.job_id)
            await ClaimStore(self._database.pool).free(job)

    async def claim(self) -> ValidationClaim | None:
        """One job that waits, while there is a place for it; of large ones some places are kept free."""
        settings = self._settings
        if len(self._running) >= settings.validations_concurrent_max:
            return None
        large_max = min(settings.large_validations_concurrent_max, settings.validations_concurrent_max - 1)
        large = sum(job.dataset_bytes >= settings.large_dataset_bytes_min for job in self._running.values())
        async with transaction(self._database.pool) as connection:
            claims = ClaimStore(connection)
            await claims.lock_validations()
            return await claims.claim_validating(
                self._ids.uuid(),
                claim_s=settings.claim_duration_s,
                organization_max=settings.validations_per_organization_max,
                large_bytes_min=settings.large_dataset_bytes_min,
                # Its own small jobs do not wait for its giants either.
                organization_large_max=max(1, settings.validations_per_organization_max // 2),
                takes_large=large < large_max,
            )

    async def _while_claimed(self, job: ValidationClaim) -> None:
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

    async def _keep_claim(self, job: ValidationClaim) -> None:
        while True:
            await self._clock.sleep(self._settings.claim_duration_s / 3)
            if not await ClaimStore(self._database.pool).renew(job, claim_s=self._settings.claim_duration_s):
                raise _ClaimLost

    async def _work(self, job: ValidationClaim) -> None:
        spec = spec_from_proto(tuning_job_pb2.TuningSpec.FromString(job.spec))
        inputs = Inputs(
            base_model=artifact_from_bytes(job.base_artifact),
            base_revision=job.base_revision,
            training_file=artifact_from_bytes(job.training_artifact),
            validation_file=None if job.validation_artifact is None else artifact_from_bytes(job.validation_artifact),
        )
        service = "a trainer"
        try:
            counts = await self._analyzer.counts(spec, inputs, _owner(job), for_job=True)
            outlook = look_ahead(spec, counts)
            service = "billing"
            request = hold_service_pb2.CreateHoldRequest(
                resource=job_name(job),
                organization_id=job.organization_id,
                project_id=job.project_id,
                price=price_request(spec, counts, job.parameter_count),
                api_key_id=job.api_key_id,
            )
            held = await self._hold(job, request)
        except DomainError as error:
            await self._apply_error(job, error, service)
            return
        await self._apply_held(job, counts, outlook, held)

    async def _hold(
        self, job: ValidationClaim, request: hold_service_pb2.CreateHoldRequest
    ) -> hold_service_pb2.CreateHoldResponse:
        """From the mark on, a cancellation knows that a hold may exist, and sees to it that it is released."""
        if not await ClaimStore(self._database.pool).request_hold(job):
            raise _ClaimLost
        return await self._peers.holds.CreateHold(request, timeout=self._settings.peer_deadline_s)

    async def _apply_held(
        self,
        job: ValidationClaim,
        counts: tuning_job_pb2.DatasetCounts,
        outlook: tuning_job_pb2.RunOutlook | None,
        held: hold_service_pb2.CreateHoldResponse,
    ) -> None:
        warned = "" if outlook is None else "".join(f"; mind {warning.field}" for warning in outlook.warnings)
        message = (
            f"{counts.training_tokens} training tokens per epoch; "
            f"${held.quote.total_nanos_usd / 1e9:.2f} held; waits for GPUs{warned}"
        )
        async with self._database.writing() as connection:
            change = await self._jobs.transition(
                connection,
                JobTransition.HELD,
                job,
                message,
                claim=job.claim,
                counts=encoded(counts),
                outlook=None if outlook is None else encoded(outlook),
                quoted_nanos_usd=held.quote.total_nanos_usd,
                price_book_version=held.quote.price_book_version,
                hold_id=held.hold_id,
            )
        if change is None:
            raise _ClaimLost

    async def _apply_error(self, job: ValidationClaim, error: DomainError, service: str) -> None:
        failures = job.service_failures + 1
        verdict = peer_errors.verdict_of(error)
        if verdict is peer_errors.Verdict.DOUBT and failures >= self._settings.attempts_max:
            verdict = peer_errors.Verdict.REFUSE
        if verdict is peer_errors.Verdict.REFUSE:
            await self._apply_refusal(job, peer_errors.failure_of(error))
            return
        await self._postpone(job, error, service, failures)

    async def _postpone(self, job: ValidationClaim, error: DomainError, service: str, failures: int) -> None:
        waiting = peer_errors.waiting_of(error, service, failures)
        log.warning("validation_postponed", job=job.job_id, service=service, error=str(error), failures=failures)
        async with self._database.writing() as connection:
            postponed = await ClaimStore(connection).postpone(
                job, delay_s=waiting.delay_s, waiting_message=waiting.message, now=self._database.now()
            )
            self._database.ring(job_topic(job.job_id))
        if not postponed:
            raise _ClaimLost

    async def _apply_refusal(self, job: ValidationClaim, failure: JobFailure) -> None:
        async with self._database.writing() as connection:
            change = await self._jobs.transition(
                connection,
                JobTransition.REFUSE,
                job,
                f"refused: {failure.message}",
                claim=job.claim,
                error=encoded(failure_to_proto(failure)),
            )
            if change is None:
                raise _ClaimLost
            await self._jobs.end(connection, change, failed_ending(change, failure))


def _owner(job: ValidationClaim) -> Caller:
    """For whom a trainer is asked."""
    return Caller(service="scheduler", tenant=job.project_id, account=job.organization_id, subject=job.api_key_id)
