"""Handlers of finemesh.artifacts.v1.ModelArtifactService, which only other services call."""

from __future__ import annotations

from chassis.db.pool import Pool
from finemesh.artifacts.v1 import model_artifact_service_pb2, model_artifact_service_pb2_grpc
from services.inference.api import convert
from services.inference.models.domain import NamespaceKind, namespace_taken, unknown_model
from services.inference.models.store import ModelStore


class ModelArtifactService(model_artifact_service_pb2_grpc.ModelArtifactServiceServicer):
    """Tells other services where a base model lies and what it allows, and whose a name is."""

    def __init__(self, pool: Pool, *, adapter_rank_max: int) -> None:
        self._pool = pool
        self._adapter_rank_max = adapter_rank_max

    async def ResolveBaseModel(
        self, request: model_artifact_service_pb2.ResolveBaseModelRequest, context: object
    ) -> model_artifact_service_pb2.ResolveBaseModelResponse:
        async with self._pool.acquire() as connection:
            found = await ModelStore(connection).find_base(request.model_id)
        if found is None:
            raise unknown_model(request.model_id)
        return convert.resolved_base_to_proto(found, self._adapter_rank_max)

    async def LookUpModelName(
        self, request: model_artifact_service_pb2.LookUpModelNameRequest, context: object
    ) -> model_artifact_service_pb2.LookUpModelNameResponse:
        async with self._pool.acquire() as connection:
            kind = await ModelStore(connection).name_kind(request.model_id)
        return model_artifact_service_pb2.LookUpModelNameResponse(use=convert.name_use_to_proto(kind))

    async def ClaimProjectNamespace(
        self, request: model_artifact_service_pb2.ClaimProjectNamespaceRequest, context: object
    ) -> model_artifact_service_pb2.ClaimProjectNamespaceResponse:
        async with self._pool.acquire() as connection:
            if not await ModelStore(connection).claim_namespace(request.slug, NamespaceKind.PROJECT):
                raise namespace_taken(request.slug, "base models", "slug")
        return model_artifact_service_pb2.ClaimProjectNamespaceResponse()
