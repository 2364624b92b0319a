"""Not pure: database, protobuf. The weights that a run continues from.

They are what an earlier job of the project shipped, or one of its kept checkpoints.
Whether they fit the request is for spec/defaults.py to say.
"""

from chassis.db.pool import Connection, Pool
from chassis.errors import DomainError, FailedPrecondition, FieldViolation, NotFound
from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.admission.store import AdmissionStore, OriginJob
from services.scheduler.jobs.convert import artifact_from_bytes, encoded, job_name
from services.scheduler.jobs.job import JobRef
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.spec.convert import spec_from_proto
from services.scheduler.spec.origin import Origin, OriginName

FIELD = "spec.from_checkpoint"
_NEWEST = -1


async def find_origin(pool: Pool, project_id: str, name: OriginName) -> Origin:
    """Raises NotFound for what this project does not have, FailedPrecondition for a job that shipped nothing yet."""
    job = await _origin_job(pool, project_id, name, FIELD)
    weights = node_pb2.StartWeights(tuning_job=job_name(JobRef(project_id=project_id, job_id=job.job_id)))
    step = name.step
    if step is None and job.state is not JobState.SUCCEEDED:
        raise _refusal(
            FailedPrecondition,
            "STATE_CONFLICT",
            f"{job.job_id} is {job.state} and has shipped no model; name one of its checkpoints: {job.job_id}:<step>",
        )
    if step is None and job.model_delete_time is not None:
        raise _deleted(job.job_id)
    if step is None and job.output_artifact is not None:
        weights.revision = job.output_revision
        weights.artifact.CopyFrom(artifact_from_bytes(job.output_artifact))
    else:
        # A job that ended before models were kept with their jobs: its last checkpoint is what it shipped.
        wanted = _NEWEST if step is None else step
        kept = await AdmissionStore(pool).get_kept_checkpoint(project_id, job.job_id, wanted)
        if kept is None:
            raise _refusal(
                NotFound, "NOT_FOUND", f"{job.job_id} has no kept checkpoint of that step; see ListCheckpoints"
            )
        weights.step = step = kept.step
        weights.artifact.CopyFrom(artifact_from_bytes(kept.artifact))
    return Origin(
        job_id=job.job_id,
        step=step,
        base_model=job.base_model,
        base_revision=job.base_revision,
        lora=spec_from_proto(tuning_job_pb2.TuningSpec.FromString(job.spec)).lora,
        start_weights=encoded(weights),
    )


async def base_model_of(pool: Pool, project_id: str, name: OriginName, field: str) -> str:
    """What the job named in `field` tunes, whatever has become of it. Raises NotFound for what this project does not
    have."""
    return (await _origin_job(pool, project_id, name, field)).base_model


async def keep(connection: Connection, project_id: str, origin: Origin) -> None:
    """From now on the weights stay: a checkpoint whatever its job commits later, a model as long as the new job needs
    it. Raises NotFound when the checkpoint was given up, or the model was deleted."""
    if origin.step is None:
        if not await AdmissionStore(connection).keep_model(project_id, origin.job_id):
            raise _deleted(origin.job_id)
        return
    if not await AdmissionStore(connection).keep_checkpoint(project_id, origin.job_id, origin.step):
        raise _refusal(
            NotFound, "NOT_FOUND", f"the checkpoint of {origin.job_id} at step {origin.step} is no longer kept"
        )


async def _origin_job(pool: Pool, project_id: str, name: OriginName, field: str) -> OriginJob:
    if name.project_id not in ("", project_id):
        raise _refusal(NotFound, "NOT_FOUND", "there is no such job in this project", field)
    job = await AdmissionStore(pool).get_origin(project_id, name)
    if job is None:
        raise _refusal(NotFound, "NOT_FOUND", "there is no such job or model in this project", field)
    return job


def _deleted(job_id: str) -> DomainError:
    return _refusal(
        NotFound,
        "NOT_FOUND",
        f"the model of {job_id} was deleted; name another job or model, or a checkpoint of {job_id} that is kept "
        f"(see ListCheckpoints): {job_id}:<step>",
    )


def _refusal(kind: type[DomainError], reason: str, description: str, field: str = FIELD) -> DomainError:
    return kind(reason, f"{field}: {description}", violations=[FieldViolation(field, description)])
