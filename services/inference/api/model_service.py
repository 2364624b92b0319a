"""Handlers of finemesh.models.v1.ModelService: check, convert, call, convert."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import NotFound, invalid
from chassis.identity import current_caller
from chassis.names import own_name, parse_name
from chassis.objects.object_store import ObjectMissing, ObjectStore
from chassis.paging import Pages
from chassis.rpc.request_stream import whole
from finemesh.models.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from services.inference.api import convert
from services.inference.api.pages import own_page
from services.inference.models.adapter_import import AdapterImporter
from services.inference.models.base_import import BaseImporter
from services.inference.models.domain import TunedModel, unknown_model
from services.inference.models.model_registry import Registry
from services.inference.models.store import ModelStore


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """The base catalogue and the registry of tuned models."""

    def __init__(
        self,
        pool: Pool,
        registry: Registry,
        importer: BaseImporter,
        adapters: AdapterImporter,
        objects: ObjectStore,
        pages: Pages,
        *,
        chunk_bytes_max: int,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._registry = registry
        self._pages = pages
        self._importer = importer
        self._adapters = adapters
        self._objects = objects
        self._chunk_bytes_max = chunk_bytes_max
        self._clock = clock

    async def ListBaseModels(
        self, request: model_service_pb2.ListBaseModelsRequest, context: object
    ) -> model_service_pb2.ListBaseModelsResponse:
        page = self._pages.read(request, scope="baseModels", kinds=(str,))
        async with self._pool.acquire() as connection:
            found = await ModelStore(connection).list_bases(page.after(""), page.row_max)
        shown, token = page.cut(found, lambda model: (model.model_id,))
        return model_service_pb2.ListBaseModelsResponse(
            base_models=[convert.base_model_to_proto(model) for model in shown], next_page_token=token
        )

    async def GetBaseModel(
        self, request: model_service_pb2.GetBaseModelRequest, context: object
    ) -> model_service_pb2.GetBaseModelResponse:
        model_id = parse_name(model_pb2.BaseModel, request.name)["base_model"]
        async with self._pool.acquire() as connection:
            found = await ModelStore(connection).find_base(model_id)
        if found is None:
            raise unknown_model(model_id)
        return model_service_pb2.GetBaseModelResponse(base_model=convert.base_model_to_proto(found))

    async def ImportBaseModel(
        self,
        request_iterator: AsyncIterator[model_service_pb2.ImportBaseModelRequest],
        context: Any,
    ) -> model_service_pb2.ImportBaseModelResponse:
        current_caller().require_role("operator")
        parts = (convert.import_part_from_proto(message) async for message in whole(request_iterator, context))
        model = await self._importer.run(parts)
        return model_service_pb2.ImportBaseModelResponse(base_model=convert.base_model_to_proto(model))

    async def ImportAdapter(
        self,
        request_iterator: AsyncIterator[model_service_pb2.ImportAdapterRequest],
        context: Any,
    ) -> model_service_pb2.ImportAdapterResponse:
        parts = (convert.adapter_part_from_proto(message) async for message in whole(request_iterator, context))
        model = await self._adapters.run(current_caller(), parts)
        return model_service_pb2.ImportAdapterResponse(model=convert.model_to_proto(model))

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: object
    ) -> model_service_pb2.ListModelsResponse:
        shown, token = await own_page(
            self._pool, self._pages, request, "models", lambda connection, *wanted: ModelStore(connection).page(*wanted)
        )
        return model_service_pb2.ListModelsResponse(
            models=[convert.model_to_proto(model) for model in shown], next_page_token=token
        )

    async def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: object
    ) -> model_service_pb2.GetModelResponse:
        return model_service_pb2.GetModelResponse(model=convert.model_to_proto(await self._find(request.name)))

    async def DeleteModel(
        self, request: model_service_pb2.DeleteModelRequest, context: object
    ) -> model_service_pb2.DeleteModelResponse:
        parts = own_name(model_pb2.Model, request.name, current_caller())
        async with transaction(self._pool) as connection:
            if not await self._registry.delete(connection, parts["project"], parts["model"], self._clock.now()):
                raise unknown_model(request.name)
        return model_service_pb2.DeleteModelResponse()

    async def DownloadModelFile(
        self, request: model_service_pb2.DownloadModelFileRequest, context: object
    ) -> AsyncIterator[model_service_pb2.DownloadModelFileResponse]:
        model = await self._find(request.name)
        file = next((f for f in model.weights.files if f.path == request.path), None)
        if file is None:
            there = ", ".join(f.path for f in model.weights.files)
            raise NotFound("NOT_FOUND", f"the model has no file {request.path[:200]!r}; it has {there}")
        if not 0 <= request.offset_bytes <= file.size_bytes:
            problem = f"must be 0 to {file.size_bytes}"
            raise invalid("offset_bytes", problem, message=problem)
        if request.offset_bytes == file.size_bytes:
            return
        chunks = self._objects.read(
            model.weights.key + file.path,
            offset_bytes=request.offset_bytes,
            chunk_bytes_max=self._chunk_bytes_max,
        )
        try:
            async for chunk in chunks:
                yield model_service_pb2.DownloadModelFileResponse(chunk=chunk)
        except ObjectMissing:
            # Nothing is wrong with the store when the model was deleted since the call began.
            await self._find(request.name)
            raise

    async def _find(self, name: str) -> TunedModel:
        """A tuned model by resource name or by the id that chat calls use."""
        caller = current_caller()
        async with self._pool.acquire() as connection:
            if name.startswith("projects/"):
                parts = own_name(model_pb2.Model, name, caller)
                found = await ModelStore(connection).find(parts["project"], id=parts["model"])
            else:
                found = await ModelStore(connection).find(caller.tenant, model_id=name)
        if found is None:
            raise unknown_model(name)
        return found
