"""Between messages of the wire and domain objects; the only module of inference that knows both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from chassis.names import format_name
from finemesh.allocations.v1 import allocation_service_pb2
from finemesh.artifacts.v1 import artifact_pb2, model_artifact_service_pb2
from finemesh.endpoints.v1 import endpoint_pb2
from finemesh.events.v1 import (
    billing_events_pb2,
    endpoint_events_pb2,
    model_events_pb2,
    tuning_events_pb2,
    usage_events_pb2,
)
from finemesh.identity.v1 import identity_pb2
from finemesh.inference.v1 import generation_pb2
from finemesh.models.v1 import model_pb2
from services.inference.domain import BaseModel, Endpoint, ModelKind, StoredFile, TunedModel, UsageOfCall, Weights
from services.inference.engines.base import FinishReason, Message, Sampling, Usage
from services.inference.spending import CapWord, CreditWord

FINISH_REASONS: Mapping[FinishReason, generation_pb2.FinishReason.ValueType] = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}
KINDS: Mapping[ModelKind, model_pb2.ModelKind.ValueType] = {
    ModelKind.ADAPTER: model_pb2.MODEL_KIND_ADAPTER,
    ModelKind.FULL: model_pb2.MODEL_KIND_FULL,
}


def timestamp(moment: datetime | None) -> Timestamp | None:
    """A timestamp, or none."""
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def project_name(project_id: str) -> str:
    """`projects/{project}`."""
    return format_name(identity_pb2.Project, project=project_id)


def model_name(model: TunedModel) -> str:
    """`projects/{project}/models/{model}`."""
    return format_name(model_pb2.Model, project=model.project_id, model=model.id)


def endpoint_name(endpoint: Endpoint) -> str:
    """`projects/{project}/endpoints/{endpoint}`."""
    return format_name(endpoint_pb2.Endpoint, project=endpoint.project_id, endpoint=endpoint.id)


def to_base_model(model: BaseModel) -> model_pb2.BaseModel:
    """The public view of a base model."""
    return model_pb2.BaseModel(
        name=format_name(model_pb2.BaseModel, base_model=model.model_id),
        model_id=model.model_id,
        revision=model.weights.revision,
        architecture=model.architecture,
        parameter_count=model.parameter_count,
        context_tokens_max=model.context_tokens_max,
        size_bytes=model.size_bytes,
        source=model.source,
        create_time=timestamp(model.created_at),
    )


def to_model(model: TunedModel) -> model_pb2.Model:
    """The public view of a tuned model."""
    return model_pb2.Model(
        name=model_name(model),
        model_id=model.model_id,
        kind=KINDS[model.kind],
        base_model=model.base_model,
        base_revision=model.base_revision,
        revision=model.weights.revision,
        adapter_rank=model.adapter_rank,
        tuning_job=model.tuning_job,
        files=[model_pb2.ModelFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in model.weights.files],
        lineage=dict(model.lineage),
        create_time=timestamp(model.created_at),
    )


def to_endpoint(endpoint: Endpoint) -> endpoint_pb2.Endpoint:
    """The public view of an endpoint."""
    return endpoint_pb2.Endpoint(
        name=endpoint_name(endpoint),
        endpoint_id=endpoint.endpoint_id,
        model=endpoint.model,
        hardware_type=endpoint.hardware_type,
        gpu_count=endpoint.gpu_count,
        state=endpoint_pb2.EndpointState.Value(f"ENDPOINT_STATE_{endpoint.state}"),
        status_message=endpoint.status_message,
        create_time=timestamp(endpoint.created_at),
        ready_time=timestamp(endpoint.ready_at),
        stop_time=timestamp(endpoint.stopped_at),
        billed_minutes=endpoint.billed_minutes,
    )


def to_artifact(weights: Weights) -> artifact_pb2.Artifact:
    """Where weights lie."""
    files = [artifact_pb2.ArtifactFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in weights.files]
    return artifact_pb2.Artifact(key=weights.key, files=files)


def to_resolved_base(model: BaseModel, adapter_rank_max: int) -> model_artifact_service_pb2.ResolveBaseModelResponse:
    """The mesh's view of a base model."""
    return model_artifact_service_pb2.ResolveBaseModelResponse(
        artifact=to_artifact(model.weights),
        revision=model.weights.revision,
        parameter_count=model.parameter_count,
        context_tokens_max=model.context_tokens_max,
        adapter_rank_max=adapter_rank_max,
    )


def from_ended(event: tuning_events_pb2.TuningJobEnded, id: str) -> TunedModel:
    """The model that a job made."""
    made = event.model
    files = tuple(StoredFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in made.artifact.files)
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
        created_at=event.end_time.ToDatetime(tzinfo=UTC),
    )


def to_registered_event(model: TunedModel) -> model_events_pb2.ModelRegistered:
    """What other services hear of a new model."""
    return model_events_pb2.ModelRegistered(
        model=model_name(model),
        model_id=model.model_id,
        revision=model.weights.revision,
        tuning_job=model.tuning_job,
        event_time=timestamp(model.created_at),
    )


def to_state_event(endpoint: Endpoint, from_state: str, now: datetime) -> endpoint_events_pb2.EndpointStateChanged:
    """What other services hear of an endpoint."""
    return endpoint_events_pb2.EndpointStateChanged(
        endpoint=endpoint_name(endpoint),
        project_id=endpoint.project_id,
        from_state=from_state,
        to_state=endpoint.state,
        event_time=timestamp(now),
    )


def to_minute_event(endpoint: Endpoint, minute: int, started_at: datetime) -> usage_events_pb2.EndpointMinuteRecorded:
    """One started minute; the key follows from endpoint, lease and minute."""
    return usage_events_pb2.EndpointMinuteRecorded(
        work_key=f"{endpoint.id}:{endpoint.lease_token}:{minute}",
        endpoint=endpoint_name(endpoint),
        project_id=endpoint.project_id,
        organization_id=endpoint.organization_id,
        hardware_type=endpoint.hardware_type,
        device_count=endpoint.gpu_count,
        minute=minute,
        usage_time=timestamp(started_at),
    )


def to_usage_event(usages: Sequence[UsageOfCall]) -> usage_events_pb2.InferenceUsageRecorded:
    """Many calls in one event."""
    records = [
        usage_events_pb2.InferenceUsage(
            work_key=usage.generation_id,
            project_id=usage.project_id,
            organization_id=usage.organization_id,
            model_id=usage.model_id,
            base_model=usage.base_model,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            usage_time=timestamp(usage.ended_at),
            api_key_id=usage.api_key_id,
        )
        for usage in usages
    ]
    return usage_events_pb2.InferenceUsageRecorded(records=records)


def from_credit_event(event: billing_events_pb2.CreditStateChanged) -> CreditWord:
    """What billing said of an organization's credit."""
    return CreditWord(organization_id=event.organization_id, state=event.to_state, revision=event.revision)


def from_cap_event(event: billing_events_pb2.SpendCapStateChanged) -> CapWord:
    """What billing said of a cap."""
    return CapWord(
        project_id=event.project_id,
        api_key_id=event.api_key_id,
        capped=event.capped,
        until_time=event.until_time.ToDatetime(tzinfo=UTC),
        cap_nanos_usd=event.cap_nanos_usd,
        revision=event.revision,
    )


def to_messages(messages: Sequence[generation_pb2.ChatMessage]) -> list[Message]:
    """The conversation as an engine takes it."""
    return [Message(role=message.role, content=message.content) for message in messages]


def to_sampling(wanted: generation_pb2.SamplingParameters, output_tokens: int) -> Sampling:
    """Sampling with defaults for what was not set."""
    return Sampling(
        temperature=wanted.temperature if wanted.HasField("temperature") else 1.0,
        top_p=wanted.top_p if wanted.HasField("top_p") else 1.0,
        top_k=wanted.top_k if wanted.HasField("top_k") else 0,
        completion_tokens_max=output_tokens,
        stop=tuple(wanted.stop),
        seed=wanted.seed if wanted.HasField("seed") else None,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
    )


def to_finish_reason(reason: FinishReason | None) -> generation_pb2.FinishReason.ValueType:
    """Why a generation ended; unspecified while it goes on."""
    return FINISH_REASONS[reason] if reason else generation_pb2.FINISH_REASON_UNSPECIFIED


def to_usage(usage: Usage) -> generation_pb2.TokenUsage:
    """Tokens of a call for its caller."""
    return generation_pb2.TokenUsage(input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)


def to_allocation_request(endpoint: Endpoint) -> allocation_service_pb2.CreateAllocationRequest:
    """What an endpoint asks the scheduler for."""
    return allocation_service_pb2.CreateAllocationRequest(
        owner=endpoint_name(endpoint), hardware_type=endpoint.hardware_type, device_count=endpoint.gpu_count
    )
