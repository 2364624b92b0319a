"""Between the messages of callers and domain objects."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from chassis.names import format_name
from chassis.timestamps import time_to_proto
from finemesh.artifacts.v1 import artifact_pb2, model_artifact_service_pb2
from finemesh.endpoints.v1 import endpoint_pb2, endpoint_service_pb2
from finemesh.models.v1 import model_pb2, model_service_pb2
from formats.manifests import FileDigest
from services.inference.endpoints.convert import endpoint_name
from services.inference.endpoints.creation import WantedEndpoint
from services.inference.endpoints.domain import Endpoint
from services.inference.models.adapter_import import AdapterHeader, AdapterPart
from services.inference.models.answer_families import NO_PARSER
from services.inference.models.base_import import ImportHeader, ImportPart
from services.inference.models.convert import model_name
from services.inference.models.domain import BaseModel, ModelKind, NameKind, TunedModel, Weights

KINDS: Mapping[ModelKind, model_pb2.ModelKind.ValueType] = {
    ModelKind.ADAPTER: model_pb2.MODEL_KIND_ADAPTER,
    ModelKind.FULL: model_pb2.MODEL_KIND_FULL,
}
_NAME_USES: Mapping[NameKind, model_artifact_service_pb2.ModelNameUse.ValueType] = {
    NameKind.BASE: model_artifact_service_pb2.MODEL_NAME_USE_BASE_MODEL,
    NameKind.TUNED: model_artifact_service_pb2.MODEL_NAME_USE_TUNED_MODEL,
    NameKind.ENDPOINT: model_artifact_service_pb2.MODEL_NAME_USE_ENDPOINT,
}


def base_model_to_proto(model: BaseModel) -> model_pb2.BaseModel:
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
        tool_parser=model.parsers.tool or NO_PARSER,
        reasoning_parser=model.parsers.reasoning or NO_PARSER,
        chat_template_given=model.chat_template_given,
        create_time=time_to_proto(model.created_at),
    )


def model_to_proto(model: TunedModel) -> model_pb2.Model:
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
        create_time=time_to_proto(model.created_at),
    )


def endpoint_to_proto(endpoint: Endpoint) -> endpoint_pb2.Endpoint:
    """The public view of an endpoint."""
    return endpoint_pb2.Endpoint(
        name=endpoint_name(endpoint),
        endpoint_id=endpoint.endpoint_id,
        model=endpoint.model,
        hardware_type=endpoint.hardware_type,
        gpu_count=endpoint.gpu_count,
        state=endpoint_pb2.EndpointState.Value(f"ENDPOINT_STATE_{endpoint.state}"),
        status_message=endpoint.status_message,
        create_time=time_to_proto(endpoint.created_at),
        ready_time=time_to_proto(endpoint.ready_at),
        stop_time=time_to_proto(endpoint.stopped_at),
        billed_minutes=endpoint.billed_minutes,
    )


def weights_to_proto(weights: Weights) -> artifact_pb2.Artifact:
    """Where weights lie."""
    files = [artifact_pb2.ArtifactFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in weights.files]
    return artifact_pb2.Artifact(key=weights.key, files=files)


def resolved_base_to_proto(
    model: BaseModel, adapter_rank_max: int
) -> model_artifact_service_pb2.ResolveBaseModelResponse:
    """The mesh's view of a base model."""
    return model_artifact_service_pb2.ResolveBaseModelResponse(
        artifact=weights_to_proto(model.weights),
        revision=model.weights.revision,
        parameter_count=model.parameter_count,
        context_tokens_max=model.context_tokens_max,
        adapter_rank_max=adapter_rank_max,
    )


def name_use_to_proto(kind: NameKind | None) -> model_artifact_service_pb2.ModelNameUse.ValueType:
    """What a name means to the mesh; None is free."""
    return model_artifact_service_pb2.MODEL_NAME_USE_UNSPECIFIED if kind is None else _NAME_USES[kind]


def import_part_from_proto(message: model_service_pb2.ImportBaseModelRequest) -> ImportPart:
    """One part of an import; None for a part that this version does not know."""
    match message.WhichOneof("part"):
        case "header":
            header = message.header
            return ImportHeader(
                model_id=header.model_id,
                source=header.source,
                tool_parser=header.tool_parser,
                reasoning_parser=header.reasoning_parser,
                chat_template=header.chat_template,
            )
        case "file":
            file = message.file
            return FileDigest(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
        case "chunk":
            return message.chunk
    return None


def adapter_part_from_proto(message: model_service_pb2.ImportAdapterRequest) -> AdapterPart:
    """As `import_part_from_proto`, for an adapter."""
    match message.WhichOneof("part"):
        case "header":
            header = message.header
            return AdapterHeader(output_name=header.output_name, base_model=header.base_model, source=header.source)
        case "file":
            file = message.file
            return FileDigest(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
        case "chunk":
            return message.chunk
    return None


def wanted_endpoint_from_proto(request: endpoint_service_pb2.CreateEndpointRequest) -> WantedEndpoint:
    """What the caller asks for, with the fingerprint of the request without its id."""
    unnumbered = endpoint_service_pb2.CreateEndpointRequest()
    unnumbered.CopyFrom(request)
    unnumbered.request_id = ""
    return WantedEndpoint(
        endpoint_name=request.endpoint_name,
        model=request.model,
        hardware_type=request.hardware_type,
        gpu_count=request.gpu_count or 1,
        request_id=request.request_id,
        fingerprint=hashlib.sha256(unnumbered.SerializeToString(deterministic=True)).hexdigest(),
    )
