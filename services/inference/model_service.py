"""Handlers of finemesh.models.v1.ModelService and of the mesh's ModelArtifactService: check, convert, call, convert."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import FieldViolation, InvalidArgument, NotFound, ResourceExhausted
from chassis.identity import current_caller
from chassis.ids import Ids
from chassis.names import own_name, own_parent, parse_name
from chassis.objects import ObjectStore
from chassis.paging import decode_token, encode_token, page_size
from chassis.rpc.streams import whole
from finemesh.artifacts.v1 import model_artifact_service_pb2, model_artifact_service_pb2_grpc
from finemesh.identity.v1 import identity_pb2
from finemesh.models.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from services.inference import convert, store
from services.inference.catalogue import Catalogue, unknown
from services.inference.config import InferenceSettings
from services.inference.domain import BaseModel, TunedModel, Weights, revision_of
from services.inference.model_import import ModelSpool, understand

MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

SOURCE = re.compile(r"[!-~]{0,300}")


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """The base catalogue and the registry of tuned models."""

    def __init__(
        self, *, pool: Pool, objects: ObjectStore, settings: InferenceSettings, clock: Clock, ids: Ids
    ) -> None:
        self._pool = pool
        self._objects = objects
        self._settings = settings
        self._clock = clock
        self._ids = ids
        self._imports = asyncio.Semaphore(settings.imports_max)

    async def ListBaseModels(
        self, request: model_service_pb2.ListBaseModelsRequest, context: object
    ) -> model_service_pb2.ListBaseModelsResponse:
        scope, size = "baseModels", page_size(request.page_size)
        cursor = decode_token(request.page_token, scope=scope, kinds=(str,))
        async with self._pool.acquire() as connection:
            found = await store.list_base_models(connection, str(cursor[0]) if cursor else "", size)
        token = encode_token((found[-1].model_id,), scope=scope) if len(found) == size else ""
        return model_service_pb2.ListBaseModelsResponse(
            base_models=[convert.to_base_model(model) for model in found], next_page_token=token
        )

    async def GetBaseModel(
        self, request: model_service_pb2.GetBaseModelRequest, context: object
    ) -> model_service_pb2.GetBaseModelResponse:
        model_id = parse_name(model_pb2.BaseModel, request.name)["base_model"]
        async with self._pool.acquire() as connection:
            found = await store.find_base_model(connection, model_id)
        if found is None:
            raise unknown(model_id)
        return model_service_pb2.GetBaseModelResponse(base_model=convert.to_base_model(found))

    async def ImportBaseModel(
        self,
        request_iterator: AsyncIterator[model_service_pb2.ImportBaseModelRequest],
        context: Any,
    ) -> model_service_pb2.ImportBaseModelResponse:
        current_caller().require_role("operator")
        if self._imports.locked():
            raise ResourceExhausted(
                "CAPACITY_EXHAUSTED",
                f"{self._settings.imports_max} imports are under way (imports_max); try again later",
                retry_after_s=10,
            )
        async with self._imports:
            folder = self._settings.data_dir / "imports" / self._ids.new("import")
            await asyncio.to_thread(folder.mkdir, parents=True)
            try:
                model = await self._import(whole(request_iterator, context), folder)
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return model_service_pb2.ImportBaseModelResponse(base_model=convert.to_base_model(model))

    async def _import(
        self, requests: AsyncIterator[model_service_pb2.ImportBaseModelRequest], folder: Path
    ) -> BaseModel:
        """Spools, understands, stores, then lists: until the last step nothing is visible."""
        header = await anext(aiter(requests), None)
        if header is None or header.WhichOneof("part") != "header":
            raise InvalidArgument("INVALID_FIELD", "the first message of an import must be its header")
        model_id = header.header.model_id
        if not MODEL_ID.fullmatch(model_id):
            problem = "must be two parts of letters, digits, '-', '_' and '.', for example finemesh/demo-llama"
            raise InvalidArgument("INVALID_FIELD", problem, violations=[FieldViolation("header.model_id", problem)])
        source = header.header.source
        if not SOURCE.fullmatch(source):
            problem = "must be at most 300 visible ASCII characters"
            raise InvalidArgument("INVALID_FIELD", problem, violations=[FieldViolation("header.source", problem)])
        spool = await self._spool(requests, folder)
        facts = await asyncio.to_thread(understand, folder, spool.files)
        revision = revision_of({file.path: file.sha256 for file in spool.files})
        key = f"base/{model_id}/{revision}/"
        for file in spool.files:
            await self._objects.put(key + file.path, self._read(folder / file.path))
        model = BaseModel(
            model_id=model_id,
            weights=Weights(revision=revision, key=key, files=tuple(spool.files)),
            architecture=facts.architecture,
            parameter_count=facts.parameter_count,
            context_tokens_max=facts.context_tokens_max,
            size_bytes=sum(file.size_bytes for file in spool.files),
            created_at=self._clock.now(),
            source=source,
        )
        async with transaction(self._pool) as connection:
            await store.save_base_model(connection, model)
        return model

    async def _spool(
        self, requests: AsyncIterator[model_service_pb2.ImportBaseModelRequest], folder: Path
    ) -> ModelSpool:
        """All files of the import on local disk, each checked."""
        limits = self._settings
        spool = ModelSpool(folder, bytes_max=limits.model_bytes_max, files_max=limits.model_files_max)
        try:
            async for message in requests:
                match message.WhichOneof("part"):
                    case "file":
                        await spool.begin(message.file.path, message.file.size_bytes, message.file.sha256)
                    case "chunk":
                        await spool.write(message.chunk)
                    case _:
                        raise InvalidArgument("INVALID_FIELD", "after the header an import has only files and chunks")
            await spool.end_file()
        finally:
            await spool.close()
        return spool

    async def _read(self, path: Path) -> AsyncIterator[bytes]:
        with path.open("rb") as source:
            while chunk := await asyncio.to_thread(source.read, self._settings.chunk_bytes_max):
                yield chunk

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: object
    ) -> model_service_pb2.ListModelsResponse:
        project_id = own_parent(identity_pb2.Project, request.parent, current_caller())["project"]
        scope, size = f"models:{project_id}", page_size(request.page_size)
        before = read_cursor(request.page_token, scope)
        async with self._pool.acquire() as connection:
            found = await store.list_models(connection, project_id, before, size)
        token = write_cursor(found[-1].created_at, found[-1].id, scope) if len(found) == size else ""
        return model_service_pb2.ListModelsResponse(
            models=[convert.to_model(model) for model in found], next_page_token=token
        )

    async def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: object
    ) -> model_service_pb2.GetModelResponse:
        return model_service_pb2.GetModelResponse(model=convert.to_model(await self._find(request.name)))

    async def DeleteModel(
        self, request: model_service_pb2.DeleteModelRequest, context: object
    ) -> model_service_pb2.DeleteModelResponse:
        parts = own_name(model_pb2.Model, request.name, current_caller())
        async with transaction(self._pool) as connection:
            if not await store.delete_model(connection, parts["project"], parts["model"], self._clock.now()):
                raise unknown(request.name)
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
            raise InvalidArgument("INVALID_FIELD", problem, violations=[FieldViolation("offset_bytes", problem)])
        if request.offset_bytes == file.size_bytes:
            return
        chunks = self._objects.read(
            model.weights.key + file.path,
            offset_bytes=request.offset_bytes,
            chunk_bytes_max=self._settings.chunk_bytes_max,
        )
        async for chunk in chunks:
            yield model_service_pb2.DownloadModelFileResponse(chunk=chunk)

    async def _find(self, name: str) -> TunedModel:
        """A tuned model by resource name or by the id that chat calls use."""
        caller = current_caller()
        async with self._pool.acquire() as connection:
            if name.startswith("projects/"):
                parts = own_name(model_pb2.Model, name, caller)
                found = await store.find_model(connection, parts["project"], id=parts["model"])
            else:
                found = await store.find_model(connection, caller.tenant, model_id=name)
        if found is None:
            raise unknown(name)
        return found


def read_cursor(token: str, scope: str) -> tuple[datetime, str]:
    """Where a page begins: after every row for the first one."""
    cursor = decode_token(token, scope=scope, kinds=(str, str))
    return (datetime.fromisoformat(str(cursor[0])), str(cursor[1])) if cursor else (store.END_OF_TIME, store.LAST_ID)


def write_cursor(created_at: datetime, id: str, scope: str) -> str:
    """The token of the page after this row."""
    return encode_token((created_at.isoformat(), id), scope=scope)


class ModelArtifactService(model_artifact_service_pb2_grpc.ModelArtifactServiceServicer):
    """Tells the mesh where a base model lies and what it allows."""

    def __init__(self, catalogue: Catalogue, settings: InferenceSettings) -> None:
        self._catalogue = catalogue
        self._settings = settings

    async def ResolveBaseModel(
        self, request: model_artifact_service_pb2.ResolveBaseModelRequest, context: object
    ) -> model_artifact_service_pb2.ResolveBaseModelResponse:
        found = await self._catalogue.base(request.model_id)
        if found is None:
            raise unknown(request.model_id)
        return convert.to_resolved_base(found, self._settings.adapter_rank_max)
