"""Models: the base catalogue, tuned models, import and download. It moves files in bounded memory and runs no model."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import cast

from finemesh.models.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from finemesh_client.errors import DataLoss, InvalidRequest
from finemesh_client.files import read_chunks, sha256_of
from finemesh_client.transport import Transport

# What a base model consists of. Weights in any other format could carry code and are never sent.
IMPORTED_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
# An adapter in peft's format, and what may lie beside it: the tokens that end its answers.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_ENDS = "generation_config.json"


def importable_files(folder: Path) -> list[Path]:
    """The files of a local model folder that an import sends. Raises InvalidRequest when it is no safetensors model,
    or has a link out of the folder."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in IMPORTED_SUFFIXES)
    _refuse_links(folder, files)
    names = {p.name for p in files}
    missing = [n for n in ("config.json", "tokenizer.json") if n not in names]
    if not any(n.endswith(".safetensors") for n in names):
        missing.append("*.safetensors (other weight formats can carry code and are not taken)")
    if missing:
        raise InvalidRequest(message=f"{folder} has no {', no '.join(missing)}", reason="MODEL_INVALID")
    return files


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter in a local folder. Raises InvalidRequest when they are not there or links out of it."""
    files = [folder / name for name in ADAPTER_FILES]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        whole = (folder / "config.json").is_file()
        hint = "; it holds a whole model: `finemesh models import`" if whole else " (other formats can carry code)"
        raise InvalidRequest(message=f"{folder} has no {', no '.join(missing)}{hint}", reason="MODEL_INVALID")
    if (folder / ADAPTER_ENDS).is_file():
        files.append(folder / ADAPTER_ENDS)
    _refuse_links(folder, files)
    return files


def _refuse_links(folder: Path, files: Sequence[Path]) -> None:
    for path in files:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InvalidRequest(
                message=f"{path} is a link out of the folder, which is not followed; give a folder with the files "
                "themselves (`cp -rL` makes one), or the hub's id",
                reason="MODEL_INVALID",
            )


class Models:
    """Base models of the platform and tuned models of the caller's project."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = model_service_pb2_grpc.ModelServiceStub(transport.channel)

    def list_base(self, limit: int | None = None) -> AsyncIterator[model_pb2.BaseModel]:
        """The base models, by id."""
        return self._transport.pages(
            self._stub.ListBaseModels, model_service_pb2.ListBaseModelsRequest(), "base_models", limit
        )

    async def get_base(self, model_id: str) -> model_pb2.BaseModel:
        """One base model, by id."""
        request = model_service_pb2.GetBaseModelRequest(name=f"baseModels/{model_id}")
        answer = await self._transport.unary(self._stub.GetBaseModel, request, safe=True)
        return cast(model_pb2.BaseModel, answer.base_model)

    async def import_base(
        self,
        model_id: str,
        folder: Path,
        *,
        files: Sequence[Path] | None = None,
        source: str = "",
        tool_parser: str = "",
        reasoning_parser: str = "",
        chat_template: str = "",
        on_bytes: Callable[[int], None] | None = None,
    ) -> model_pb2.BaseModel:
        """Adds a local folder, or some `files` of it, to the base catalogue. Needs the operator role; the same files
        give the same revision. `source` says where they come from, and is shown with the model. The parsers are vLLM's
        names, `none`, or empty for what the chat template tells. A `chat_template` wins over that of the files."""
        files = importable_files(folder) if files is None else files
        digests = {path: await asyncio.to_thread(sha256_of, path) for path in files}

        async def parts() -> AsyncIterator[model_service_pb2.ImportBaseModelRequest]:
            yield model_service_pb2.ImportBaseModelRequest(
                header=model_service_pb2.ImportBaseModelHeader(
                    model_id=model_id,
                    source=source,
                    tool_parser=tool_parser,
                    reasoning_parser=reasoning_parser,
                    chat_template=chat_template,
                )
            )
            for path in files:
                start = model_service_pb2.ImportBaseModelFile(
                    path=path.name, size_bytes=path.stat().st_size, sha256=digests[path]
                )
                yield model_service_pb2.ImportBaseModelRequest(file=start)
                async for chunk in read_chunks(path, on_bytes):
                    yield model_service_pb2.ImportBaseModelRequest(chunk=chunk)

        answer = await self._transport.upload(self._stub.ImportBaseModel, parts)
        return cast(model_pb2.BaseModel, answer.base_model)

    async def import_adapter(
        self,
        output_name: str,
        base_model: str,
        folder: Path,
        *,
        files: Sequence[Path] | None = None,
        source: str = "",
        on_bytes: Callable[[int], None] | None = None,
    ) -> model_pb2.Model:
        """Adds an adapter in peft's format to the project: its `files`, those of a local folder by default. It is then
        a model like one that a job made. An import that was cut left nothing and can be sent again; one whose answer
        was lost returns the model that it made."""
        files = adapter_files(folder) if files is None else files
        digests = {path: await asyncio.to_thread(sha256_of, path) for path in files}

        async def parts() -> AsyncIterator[model_service_pb2.ImportAdapterRequest]:
            yield model_service_pb2.ImportAdapterRequest(
                header=model_service_pb2.ImportAdapterHeader(
                    output_name=output_name, base_model=base_model, source=source
                )
            )
            for path in files:
                start = model_service_pb2.ImportAdapterFile(
                    path=path.name, size_bytes=path.stat().st_size, sha256=digests[path]
                )
                yield model_service_pb2.ImportAdapterRequest(file=start)
                async for chunk in read_chunks(path, on_bytes):
                    yield model_service_pb2.ImportAdapterRequest(chunk=chunk)

        answer = await self._transport.upload(self._stub.ImportAdapter, parts, safe=True)
        return cast(model_pb2.Model, answer.model)

    def list(self, limit: int | None = None) -> AsyncIterator[model_pb2.Model]:
        """The project's tuned models, newest first."""
        return self._transport.pages(self._stub.ListModels, model_service_pb2.ListModelsRequest(), "models", limit)

    async def get(self, name: str) -> model_pb2.Model:
        """One tuned model, by resource name or by model id."""
        request = model_service_pb2.GetModelRequest(name=name)
        answer = await self._transport.unary(self._stub.GetModel, request, safe=True)
        return cast(model_pb2.Model, answer.model)

    async def delete(self, name: str) -> None:
        """Removes a tuned model."""
        await self._transport.unary(self._stub.DeleteModel, model_service_pb2.DeleteModelRequest(name=name), safe=True)

    async def download(
        self, name: str, folder: Path, *, on_bytes: Callable[[int], None] | None = None
    ) -> tuple[Path, ...]:
        """Writes every file of a tuned model below `folder`; raises DataLoss when a digest differs."""
        model = await self.get(name)
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        written = [await self._download_file(model.name, described, folder, on_bytes) for described in model.files]
        return tuple(written)

    async def _download_file(
        self, name: str, described: model_pb2.ModelFile, folder: Path, on_bytes: Callable[[int], None] | None
    ) -> Path:
        """One file, whole or not at all."""
        target = folder / Path(described.path).name
        partial, digest = target.with_name(target.name + ".partial"), hashlib.sha256()
        request = model_service_pb2.DownloadModelFileRequest(name=name, path=described.path)
        with partial.open("wb") as out:
            async for message in self._transport.stream(self._stub.DownloadModelFile, request):
                digest.update(message.chunk)
                await asyncio.to_thread(out.write, message.chunk)
                if on_bytes:
                    on_bytes(len(message.chunk))
        if digest.hexdigest() != described.sha256:
            partial.unlink()
            raise DataLoss(message=f"{described.path}: the downloaded bytes do not match", reason="DATA_CORRUPT")
        return partial.replace(target)
