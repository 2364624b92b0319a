"""Between jobs and the messages that are stored, published or told of them: names, errors, events.

It decides nothing and calls nobody.
"""

from datetime import datetime

from google.protobuf.message import Message

from chassis.errors import NotFound
from chassis.names import format_name, parse_name
from chassis.timestamps import time_to_proto
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.events.v1 import tuning_events_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.jobs.endings import Ending, JobFailure
from services.scheduler.jobs.job import JobRef, NewJob, Transitioned, TunedModel
from services.scheduler.jobs.lifecycle import INITIAL


def job_name(ref: JobRef) -> str:
    """The resource name."""
    return format_name(tuning_job_pb2.TuningJob, project=ref.project_id, tuning_job=ref.job_id)


def job_ref(name: str) -> JobRef:
    """The job that another service calls by its name."""
    parts = parse_name(tuning_job_pb2.TuningJob, name, "name")
    return JobRef(project_id=parts["project"], job_id=parts["tuning_job"])


def folder_key_prefix(ref: JobRef) -> str:
    """Where all files that a job's attempts store are, in the artifact store."""
    return f"jobs/{ref.project_id}/{ref.job_id}/"


def unknown_job(ref: JobRef) -> NotFound:
    name = job_name(ref)
    return NotFound("NOT_FOUND", f"there is no tuning job {name}", metadata={"name": name})


def encoded(message: Message) -> bytes:
    """A message as it is stored: equal messages have equal bytes."""
    return message.SerializeToString(deterministic=True)


def artifact_from_bytes(stored: bytes) -> artifact_pb2.Artifact:
    return artifact_pb2.Artifact.FromString(stored)


def failure_to_proto(failure: JobFailure) -> tuning_job_pb2.JobError:
    return tuning_job_pb2.JobError(
        reason=failure.reason,
        message=failure.message,
        platform_fault=failure.platform_fault,
        metadata=failure.metadata,
    )


def failure_from_proto(message: tuning_job_pb2.JobError) -> JobFailure:
    return JobFailure(
        reason=message.reason or "TRAINING_FAILED",
        message=message.message,
        platform_fault=message.platform_fault,
        metadata=dict(message.metadata),
    )


def new_job_to_proto(job: NewJob, now: datetime) -> tuning_events_pb2.TuningJobStateChanged:
    """The event of a job's first state."""
    return tuning_events_pb2.TuningJobStateChanged(
        tuning_job=job_name(job),
        project_id=job.project_id,
        organization_id=job.organization_id,
        to_state=INITIAL.value,
        event_time=time_to_proto(now),
    )


def transition_to_proto(change: Transitioned, now: datetime) -> tuning_events_pb2.TuningJobStateChanged:
    return tuning_events_pb2.TuningJobStateChanged(
        tuning_job=job_name(change),
        project_id=change.project_id,
        organization_id=change.organization_id,
        from_state=change.from_state.value,
        to_state=change.to_state.value,
        event_time=time_to_proto(now),
    )


def ending_to_proto(
    change: Transitioned, ending: Ending, usage_record_count: int, model: TunedModel | None, now: datetime
) -> tuning_events_pb2.TuningJobEnded:
    return tuning_events_pb2.TuningJobEnded(
        tuning_job=job_name(change),
        project_id=change.project_id,
        organization_id=change.organization_id,
        ending=tuning_events_pb2.TuningJobEnding.Value(f"TUNING_JOB_ENDING_{ending.value}"),
        usage_record_count=usage_record_count,
        end_time=time_to_proto(now),
        model=None if model is None else _model_to_proto(model),
    )


def _model_to_proto(model: TunedModel) -> tuning_events_pb2.TunedModel:
    return tuning_events_pb2.TunedModel(
        model_id=model.model_id,
        revision=model.revision,
        kind=model.kind,
        adapter_rank=model.adapter_rank,
        base_model=model.base_model,
        base_revision=model.base_revision,
        artifact=artifact_from_bytes(model.artifact),
        lineage=model.lineage,
    )
