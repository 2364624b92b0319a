"""Between the registry's models and the events that other services send and hear of them."""

from __future__ import annotations

from datetime import datetime

from chassis.bus.envelope import claimed_time
from chassis.errors import InvalidArgument
from chassis.names import format_name
from chassis.timestamps import time_to_proto
from finemesh.events.v1 import model_events_pb2, tuning_events_pb2
from finemesh.models.v1 import model_pb2
from formats.manifests import FileDigest
from services.inference.models.domain import ModelKind, TunedModel, Weights


def model_name(model: TunedModel) -> str:
    """`projects/{project}/models/{model}`."""
    return format_name(model_pb2.Model, project=model.project_id, model=model.id)


def ended_job_from_proto(event: tuning_events_pb2.TuningJobEnded, id: str) -> TunedModel:
    """The model that a job made, under its new id; InvalidArgument for a kind that this version does not know."""
    made = event.model
    if made.kind not in {kind.value for kind in ModelKind}:
        known = ", ".join(kind.value for kind in ModelKind)
        raise InvalidArgument("EVENT_INVALID", f"model.kind is {made.kind!r}; this version knows {known}")
    files = tuple(FileDigest(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in made.artifact.files)
    return TunedModel(
        id=id,
        project_id=event.project_id,
        model_id=made.model_id,
        kind=ModelKind(made.kind),
        base_model=made.base_model,
        base_revision=made.base_revision,
        weights=Weights(revision=made.revision, key=made.artifact.key, files=files),
        adapter_rank=made.adapter_rank,
        tuning_job=event.tuning_job,
        lineage=dict(made.lineage),
        created_at=claimed_time("end_time", event.end_time),
    )


def model_deleted_to_proto(model: TunedModel, now: datetime) -> model_events_pb2.ModelDeleted:
    """What other services hear of a model that its owner deleted."""
    return model_events_pb2.ModelDeleted(
        model=model_name(model),
        model_id=model.model_id,
        revision=model.weights.revision,
        tuning_job=model.tuning_job,
        event_time=time_to_proto(now),
    )


def model_registered_to_proto(model: TunedModel) -> model_events_pb2.ModelRegistered:
    """What other services hear of a new model."""
    return model_events_pb2.ModelRegistered(
        model=model_name(model),
        model_id=model.model_id,
        revision=model.weights.revision,
        tuning_job=model.tuning_job,
        event_time=time_to_proto(model.created_at),
    )
