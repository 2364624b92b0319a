"""The events that other services hear of, made from domain values. It knows the contracts of finemesh.events.v1 only."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from finemesh.events.v1 import node_events_pb2, tuning_events_pb2, usage_events_pb2
from services.scheduler.convert import artifact_from, job_name, timestamp_of
from services.scheduler.domain import Ending, Transitioned, Usage


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that a job made; `artifact` is an encoded finemesh.artifacts.v1.Artifact."""

    model_id: str
    revision: str
    kind: str
    adapter_rank: int
    base_model: str
    base_revision: str
    artifact: bytes
    lineage: Mapping[str, str]


def job_created(
    project_id: str, job_id: str, organization_id: str, state: str, now: datetime
) -> tuning_events_pb2.TuningJobStateChanged:
    return tuning_events_pb2.TuningJobStateChanged(
        tuning_job=job_name(project_id, job_id),
        project_id=project_id,
        organization_id=organization_id,
        to_state=state,
        event_time=timestamp_of(now),
    )


def job_state_changed(change: Transitioned, now: datetime) -> tuning_events_pb2.TuningJobStateChanged:
    return tuning_events_pb2.TuningJobStateChanged(
        tuning_job=job_name(change.project_id, change.job_id),
        project_id=change.project_id,
        organization_id=change.organization_id,
        from_state=change.from_state.value,
        to_state=change.to_state.value,
        event_time=timestamp_of(now),
    )


def job_ended(
    change: Transitioned, ending: Ending, usage_record_count: int, model: Model | None, now: datetime
) -> tuning_events_pb2.TuningJobEnded:
    event = tuning_events_pb2.TuningJobEnded(
        tuning_job=job_name(change.project_id, change.job_id),
        project_id=change.project_id,
        organization_id=change.organization_id,
        ending=tuning_events_pb2.TuningJobEnding.Value(f"TUNING_JOB_ENDING_{ending.value}"),
        usage_record_count=usage_record_count,
        end_time=timestamp_of(now),
    )
    if model is not None:
        event.model.CopyFrom(
            tuning_events_pb2.TunedModel(
                model_id=model.model_id,
                revision=model.revision,
                kind=model.kind,
                adapter_rank=model.adapter_rank,
                base_model=model.base_model,
                base_revision=model.base_revision,
                artifact=artifact_from(model.artifact),
                lineage=model.lineage,
            )
        )
    return event


def training_usage(
    project_id: str, job_id: str, organization_id: str, usage: Usage, now: datetime
) -> usage_events_pb2.TrainingUsageRecorded:
    return usage_events_pb2.TrainingUsageRecorded(
        work_key=usage.work_key(job_id),
        tuning_job=job_name(project_id, job_id),
        project_id=project_id,
        organization_id=organization_id,
        kind=usage.kind,
        start_step=usage.start_step,
        end_step=usage.end_step,
        tokens=usage.tokens,
        usage_time=timestamp_of(now),
    )


def node_state_changed(node: str, state: str, now: datetime) -> node_events_pb2.NodeStateChanged:
    return node_events_pb2.NodeStateChanged(node=node, to_state=state, event_time=timestamp_of(now))
