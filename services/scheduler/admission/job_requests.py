"""Not pure: database. What users ask of jobs: create one, once per request id, and cancel one. It shows nothing."""

import hashlib

import asyncpg

from chassis.errors import AlreadyExists, FailedPrecondition, FieldViolation
from chassis.identity import Caller
from chassis.ids import Ids
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.admission.admission import Admission, Admitted
from services.scheduler.admission.continuation import keep
from services.scheduler.attempts.store import AttemptStore
from services.scheduler.database import Database
from services.scheduler.jobs.convert import encoded, job_name, unknown_job
from services.scheduler.jobs.endings import cancelled_ending
from services.scheduler.jobs.job import JobRef, NewJob
from services.scheduler.jobs.job_secrets import JobSecrets
from services.scheduler.jobs.lifecycle import FINAL, JobState, JobTransition
from services.scheduler.jobs.store import JobStore
from services.scheduler.jobs.transitions import JobTransitions
from services.scheduler.spec.convert import spec_to_proto
from services.scheduler.spec.integrations import ProvidedSecrets
from services.scheduler.watching.hub import node_topic

JOB_PREFIX = "ft"
# A job may be placed or requeued between a look and the next; more often than this in a row is no accident.
CANCEL_RACES_MAX = 5


class JobRequests:
    def __init__(
        self, database: Database, jobs: JobTransitions, admission: Admission, job_secrets: JobSecrets, ids: Ids
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._admission = admission
        self._secrets = job_secrets
        self._ids = ids

    async def create(
        self, caller: Caller, spec: tuning_job_pb2.TuningSpec, provided: ProvidedSecrets, request_id: str
    ) -> str:
        """The id of the new job, or of the one that the same request made before, with the secrets that came then."""
        digest = hashlib.sha256(encoded(spec)).hexdigest()
        known = await self._known(caller, request_id, digest)
        if known is not None:
            return known
        job_id = self._ids.new(JOB_PREFIX)
        if not provided.is_empty:
            self._secrets.require()
        admitted = await self._admission.admit(spec, caller, job_id, provided)
        job = _new_job(caller, job_id, admitted, request_id, digest)
        await self._admission.refuse_taken_name(job.namespace, job.output_name)
        try:
            async with self._database.writing() as connection:
                if admitted.origin is not None:
                    await keep(connection, caller.tenant, admitted.origin)
                await self._jobs.create(connection, job)
                await self._secrets.keep(connection, job, provided)
        except asyncpg.UniqueViolationError as error:
            known = await self._known(caller, request_id, digest)
            if known is not None:
                return known
            raise _name_taken(job) from error
        return job_id

    async def cancel(self, ref: JobRef) -> None:
        """Cancels what waits, asks the node of what runs to stop; a job that was cancelled before is no error."""
        state = None
        for _ in range(CANCEL_RACES_MAX):
            if await self._try_cancel(ref):
                return
            job = await JobStore(self._database.pool).get(ref)
            if job is None:
                raise unknown_job(ref)
            if job.state in (JobState.CANCELLING, JobState.CANCELLED):
                return
            state = job.state
            if state in FINAL:
                break
        raise FailedPrecondition(
            "STATE_CONFLICT", f"the job is {state} and cannot be cancelled now", metadata={"state": str(state)}
        )

    async def _try_cancel(self, ref: JobRef) -> bool:
        async with self._database.writing() as connection:
            change = await self._jobs.transition(connection, JobTransition.CANCEL_WAITING, ref, "cancelled")
            if change is not None:
                await self._jobs.end(connection, change, cancelled_ending(change))
                return True
            message = "cancellation asked for; the node finishes its step"
            change = await self._jobs.transition(connection, JobTransition.CANCEL_RUNNING, ref, message)
            if change is None:
                return False
            node = await AttemptStore(connection).node_of(ref)
            if node is not None:
                self._database.ring(node_topic(node))
            return True

    async def _known(self, caller: Caller, request_id: str, digest: str) -> str | None:
        if not request_id:
            return None
        found = await JobStore(self._database.pool).get_by_request(caller.tenant, request_id)
        if found is None:
            return None
        job_id, first_digest = found
        if first_digest != digest:
            raise AlreadyExists(
                "REQUEST_ID_REUSED",
                "this request_id came before with a different spec; use a new one",
                violations=[FieldViolation("request_id", f"belongs to {job_id}, whose spec differs")],
                metadata={"tuning_job": job_name(JobRef(project_id=caller.tenant, job_id=job_id))},
            )
        return job_id


def _new_job(caller: Caller, job_id: str, admitted: Admitted, request_id: str, digest: str) -> NewJob:
    inputs = admitted.inputs
    validation = inputs.validation_file
    return NewJob(
        project_id=caller.tenant,
        job_id=job_id,
        organization_id=caller.account,
        api_key_id=caller.subject,
        namespace=caller.namespace or caller.tenant,
        request_id=request_id or None,
        request_sha256=digest,
        spec=encoded(spec_to_proto(admitted.spec)),
        base_model=admitted.spec.base_model,
        base_revision=inputs.base_revision,
        parameter_count=admitted.parameter_count,
        output_name=admitted.spec.output_name,
        gpu_count=admitted.spec.gpu_count,
        memory_bytes_min=admitted.memory_bytes_min,
        base_artifact=encoded(inputs.base_model),
        training_artifact=encoded(inputs.training_file),
        validation_artifact=None if validation is None else encoded(validation),
        dataset_bytes=inputs.dataset_bytes,
        start_weights=admitted.start_weights,
        start_model_job_id=admitted.start_model_job_id,
    )


def _name_taken(job: NewJob) -> AlreadyExists:
    return AlreadyExists(
        "ALREADY_EXISTS",
        f"spec.output_name: another job of this project makes, or made, {job.namespace}/{job.output_name}; "
        "choose another name",
        violations=[FieldViolation("spec.output_name", f"{job.output_name!r} is taken in this project")],
    )
