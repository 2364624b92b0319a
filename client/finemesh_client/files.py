"""Files: upload with a digest, list, download, delete. It reads and writes local files in bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

from finemesh.files.v1 import dataset_preview_pb2, file_pb2, file_service_pb2, file_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2, tuning_service_pb2_grpc
from finemesh_client.errors import DataLoss
from finemesh_client.transport import Transport

CHUNK_BYTES = 1024 * 1024
# A preview checks the whole file before it shows rows of it.
PREVIEW_TIMEOUT_S = 600.0


def sha256_of(path: Path) -> str:
    """Lower-case hex SHA-256 of a local file."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


async def read_chunks(
    path: Path, on_bytes: Callable[[int], None] | None, digest: hashlib._Hash | None = None
) -> AsyncIterator[bytes]:
    """The file's bytes in chunks, which go into `digest` as well; the next one is read while one is sent."""

    def read() -> bytes:
        chunk = source.read(CHUNK_BYTES)
        if digest is not None:
            digest.update(chunk)
        return chunk

    loop = asyncio.get_running_loop()
    with path.open("rb") as source:
        reading = loop.run_in_executor(None, read)
        try:
            while chunk := await reading:
                reading = loop.run_in_executor(None, read)
                if on_bytes:
                    on_bytes(len(chunk))
                yield chunk
        finally:
            # The file stays open for whoever still reads.
            await asyncio.wait({reading})


class Files:
    """Datasets of the caller's project."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = file_service_pb2_grpc.FileServiceStub(transport.channel)

    async def upload(
        self, path: Path, *, request_id: str | None = None, on_bytes: Callable[[int], None] | None = None
    ) -> file_pb2.File:
        """Uploads a dataset; the answer carries the check of every line. `on_bytes` hears how many bytes were sent.

        Raises DataLoss when the server stored something else than was read. With a `request_id` of the caller's own the
        file is read once before, so that a repetition with other bytes is told apart.
        """
        announced = await asyncio.to_thread(sha256_of, path) if request_id else ""
        header = file_service_pb2.UploadFileHeader(
            display_name=path.name,
            purpose=file_pb2.FILE_PURPOSE_FINE_TUNE,
            size_bytes=(await asyncio.to_thread(path.stat)).st_size,
            sha256=announced,
            request_id=request_id or uuid.uuid4().hex,
        )

        digest = hashlib.sha256()

        async def parts() -> AsyncIterator[file_service_pb2.UploadFileRequest]:
            nonlocal digest
            digest = hashlib.sha256()
            yield file_service_pb2.UploadFileRequest(header=header)
            async for chunk in read_chunks(path, on_bytes, digest):
                yield file_service_pb2.UploadFileRequest(chunk=chunk)

        # Its request_id makes it safe to repeat.
        answer = await self._transport.upload(self._stub.UploadFile, parts, safe=True)
        file = cast(file_service_pb2.UploadFileResponse, answer).file
        if file.sha256 != (announced or digest.hexdigest()):
            message = f"{file.name}: the stored bytes are not those of {path.name}; delete it and upload again"
            raise DataLoss(message=message, reason="DATA_CORRUPT")
        return file

    async def get(self, name: str) -> file_pb2.File:
        """One file's description."""
        request = file_service_pb2.GetFileRequest(name=name)
        return cast(file_pb2.File, (await self._transport.unary(self._stub.GetFile, request, safe=True)).file)

    def list(self, limit: int | None = None) -> AsyncIterator[file_pb2.File]:
        """The project's files, newest first."""
        return self._transport.pages(self._stub.ListFiles, file_service_pb2.ListFilesRequest(), "files", limit)

    async def download(self, name: str, target: Path) -> int:
        """Writes the file's bytes to `target` and returns their number; raises DataLoss when the digest differs."""
        described = await self.get(name)
        digest, written, partial = hashlib.sha256(), 0, target.with_name(target.name + ".partial")
        request = file_service_pb2.DownloadFileRequest(name=name)
        with partial.open("wb") as out:
            async for message in self._transport.stream(self._stub.DownloadFile, request):
                digest.update(message.chunk)
                written += await asyncio.to_thread(out.write, message.chunk)
        if digest.hexdigest() != described.sha256:
            partial.unlink()
            raise DataLoss(message=f"{name}: the downloaded bytes do not match its SHA-256", reason="DATA_CORRUPT")
        partial.replace(target)
        return written

    async def preview(
        self,
        name: str,
        base_model: str,
        *,
        rows: int = 0,
        tokens_shown: int = 0,
        sequence_tokens_max: int = 0,
        train_on_inputs: tuning_job_pb2.TrainOnInputs.ValueType = tuning_job_pb2.TRAIN_ON_INPUTS_AUTO,
    ) -> dataset_preview_pb2.DatasetPreview:
        """Sampled rows as a training on `base_model` would see them, token by token; 0 takes the server's default."""
        request = tuning_service_pb2.PreviewDatasetRequest(
            file=name,
            base_model=base_model,
            row_count_max=rows,
            tokens_shown_max=tokens_shown,
            sequence_tokens_max=sequence_tokens_max,
            train_on_inputs=train_on_inputs,
        )
        call = tuning_service_pb2_grpc.TuningServiceStub(self._transport.channel).PreviewDataset
        answer = await self._transport.unary(call, request, safe=True, timeout_s=PREVIEW_TIMEOUT_S)
        return cast(tuning_service_pb2.PreviewDatasetResponse, answer).preview

    async def storage(self) -> file_service_pb2.Storage:
        """What the project stores and may store."""
        request = file_service_pb2.GetStorageRequest()
        answer = await self._transport.unary(self._stub.GetStorage, request, safe=True)
        return cast(file_service_pb2.GetStorageResponse, answer).storage

    async def set_quota(
        self, project: str, *, size_bytes_max: int | None = None, file_count_max: int | None = None
    ) -> file_service_pb2.Storage:
        """Sets what a project may store; None is what the platform's settings say. Needs the operator role."""
        request = file_service_pb2.SetStorageQuotaRequest(
            parent=project, size_bytes_max=size_bytes_max, file_count_max=file_count_max
        )
        answer = await self._transport.unary(self._stub.SetStorageQuota, request, safe=True)
        return cast(file_service_pb2.SetStorageQuotaResponse, answer).storage

    async def delete(self, name: str) -> None:
        """Deletes a file."""
        await self._transport.unary(self._stub.DeleteFile, file_service_pb2.DeleteFileRequest(name=name), safe=True)
