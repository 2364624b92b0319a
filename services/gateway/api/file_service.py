"""The public FileService: checks what came, and hands over to the uploads, the tables and the artifact store."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from typing import Any

from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import DataLoss, FieldViolation, NotFound, OutOfRange, invalid
from chassis.identity import Caller, current_caller
from chassis.names import format_name, own_name, own_parent, parse_name
from chassis.objects.object_store import ObjectStore
from chassis.paging import Pages
from chassis.rpc.request_stream import whole
from finemesh.files.v1 import file_pb2, file_service_pb2, file_service_pb2_grpc
from finemesh.identity.v1 import identity_pb2
from services.gateway.api import convert
from services.gateway.config import GatewaySettings
from services.gateway.files.artifact_gc import ArtifactCollector
from services.gateway.files.domain import StoredFile, artifact_key
from services.gateway.files.reservation import default_quota
from services.gateway.files.store import FileStore
from services.gateway.files.upload_places import Uploader
from services.gateway.files.upload_stream import Announced, size_limit
from services.gateway.files.uploads import NewFile, Uploads
from services.gateway.identity.key_watch import KeyWatch, OpenStream
from services.gateway.requests.idempotency import Request

_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileService(file_service_pb2_grpc.FileServiceServicer):
    def __init__(
        self,
        pool: Pool,
        artifacts: ObjectStore,
        uploads: Uploads,
        collector: ArtifactCollector,
        key_watch: KeyWatch,
        clock: Clock,
        settings: GatewaySettings,
    ) -> None:
        self._pool = pool
        self._artifacts = artifacts
        self._uploads = uploads
        self._collector = collector
        self._key_watch = key_watch
        self._clock = clock
        self._settings = settings
        self._pages = Pages(settings.page_token_key)

    async def UploadFile(self, request_iterator: Any, context: Any) -> file_service_pb2.UploadFileResponse:
        requests: AsyncIterator[file_service_pb2.UploadFileRequest] = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise invalid("header", "must be the first message of the stream")
        new = self._new_file(first.header, current_caller())
        with self._key_watch.over(current_caller().subject) as stream:
            file_id = await self._uploads.take(new, _chunks(whole(requests, context), stream))
        name = format_name(file_pb2.File, project=new.project_id, file=file_id)
        file = await self._file(new.project_id, file_id, name)
        return file_service_pb2.UploadFileResponse(file=convert.file_to_proto(file))

    async def GetFile(self, request: file_service_pb2.GetFileRequest, context: Any) -> file_service_pb2.GetFileResponse:
        file = await self._named(request.name, current_caller())
        return file_service_pb2.GetFileResponse(file=convert.file_to_proto(file))

    async def ListFiles(
        self, request: file_service_pb2.ListFilesRequest, context: Any
    ) -> file_service_pb2.ListFilesResponse:
        project_id = own_parent(identity_pb2.Project, request.parent, current_caller())["project"]
        page = self._pages.read(request, scope=f"files:{project_id}", kinds=(str,))
        async with self._pool.acquire() as connection:
            found = await FileStore(connection).list_files(project_id, page.after(""), page.row_max)
        files, token = page.cut(found, lambda file: (file.file_id,))
        return file_service_pb2.ListFilesResponse(
            files=[convert.file_to_proto(file) for file in files], next_page_token=token
        )

    async def DownloadFile(
        self, request: file_service_pb2.DownloadFileRequest, context: Any
    ) -> AsyncIterator[file_service_pb2.DownloadFileResponse]:
        file = await self._named(request.name, current_caller())
        offset_bytes = request.offset_bytes
        if not 0 <= offset_bytes <= file.size_bytes:
            description = f"must be 0 to {file.size_bytes}, the size of the file"
            violations = [FieldViolation("offset_bytes", description)]
            raise OutOfRange("INVALID_FIELD", f"offset_bytes {description}", violations=violations)
        if offset_bytes == file.size_bytes:
            return
        digest = hashlib.sha256()
        chunks = self._artifacts.read(
            artifact_key(file.project_id, file.file_id),
            offset_bytes=offset_bytes,
            chunk_bytes_max=self._settings.chunk_bytes_max,
        )
        with self._key_watch.over(current_caller().subject) as stream:
            async for chunk in chunks:
                stream.check()
                if not offset_bytes:
                    await asyncio.to_thread(digest.update, chunk)
                yield file_service_pb2.DownloadFileResponse(chunk=chunk)
        if not offset_bytes and digest.hexdigest() != file.sha256:
            raise DataLoss("DATA_CORRUPT", "the stored bytes do not match their digest; upload the file again")

    async def DeleteFile(
        self, request: file_service_pb2.DeleteFileRequest, context: Any
    ) -> file_service_pb2.DeleteFileResponse:
        parts = own_name(file_pb2.File, request.name, current_caller())
        now, kept_s = self._clock.now(), self._settings.deleted_file_retention_s
        async with transaction(self._pool) as connection:
            if not await FileStore(connection).delete(parts["project"], parts["file"], now):
                raise _not_found(request.name)
            await FileStore(connection).add_removal(artifact_key(parts["project"], parts["file"]), kept_s)
        self._collector.wake()
        return file_service_pb2.DeleteFileResponse()

    async def GetStorage(
        self, request: file_service_pb2.GetStorageRequest, context: Any
    ) -> file_service_pb2.GetStorageResponse:
        project_id = own_parent(identity_pb2.Project, request.parent, current_caller())["project"]
        return file_service_pb2.GetStorageResponse(storage=await self._storage(project_id))

    async def SetStorageQuota(
        self, request: file_service_pb2.SetStorageQuotaRequest, context: Any
    ) -> file_service_pb2.SetStorageQuotaResponse:
        current_caller().require_role("operator")
        project_id = parse_name(identity_pb2.Project, request.parent, "parent")["project"]
        for field in ("size_bytes_max", "file_count_max"):
            if getattr(request, field) < 0:
                raise invalid(field, "must not be negative")
        async with transaction(self._pool) as connection:
            quota = (
                request.size_bytes_max if request.HasField("size_bytes_max") else None,
                request.file_count_max if request.HasField("file_count_max") else None,
            )
            if not await FileStore(connection).set_quota(project_id, *quota):
                raise _not_found(request.parent)
        return file_service_pb2.SetStorageQuotaResponse(storage=await self._storage(project_id))

    async def _storage(self, project_id: str) -> file_service_pb2.Storage:
        async with self._pool.acquire() as connection:
            storage = await FileStore(connection).storage(project_id, default_quota(self._settings))
        if storage is None:
            raise _not_found(format_name(identity_pb2.Project, project=project_id))
        return convert.storage_to_proto(storage)

    def _new_file(self, header: file_service_pb2.UploadFileHeader, caller: Caller) -> NewFile:
        project_id = own_parent(identity_pb2.Project, header.parent, caller, "header.parent")["project"]
        if header.purpose not in (file_pb2.FILE_PURPOSE_UNSPECIFIED, file_pb2.FILE_PURPOSE_FINE_TUNE):
            raise invalid("header.purpose", "must be FILE_PURPOSE_FINE_TUNE")
        if header.size_bytes < 0:
            raise invalid("header.size_bytes", "must not be negative")
        if header.size_bytes > self._settings.file_size_bytes_max:
            limit = self._settings.file_size_bytes_max
            raise size_limit("the file", "file_size_bytes_max", header.size_bytes, limit)
        if header.sha256 and not _SHA256.fullmatch(header.sha256):
            raise invalid("header.sha256", "must be 64 lower-case hex digits, or empty")
        return NewFile(
            project_id=project_id,
            uploader=Uploader(organization_id=caller.account, key_id=caller.subject),
            display_name=convert.checked_display_name(header.display_name, "header.display_name"),
            announced=Announced(size_bytes=header.size_bytes, sha256=header.sha256),
            request=Request(
                project_id=project_id,
                method="UploadFile",
                request_id=convert.checked_request_id(header.request_id, "header.request_id"),
                fingerprint=convert.fingerprint(header, project_id),
            ),
        )

    async def _named(self, name: str, caller: Caller) -> StoredFile:
        parts = own_name(file_pb2.File, name, caller)
        return await self._file(parts["project"], parts["file"], name)

    async def _file(self, project_id: str, file_id: str, name: str) -> StoredFile:
        async with self._pool.acquire() as connection:
            file = await FileStore(connection).file(project_id, file_id)
        if file is None:
            raise _not_found(name)
        return file


async def _chunks(
    requests: AsyncIterator[file_service_pb2.UploadFileRequest], stream: OpenStream
) -> AsyncIterator[bytes]:
    async for request in requests:
        stream.check()
        if request.WhichOneof("part") != "chunk":
            raise invalid("chunk", "must be the part of every message after the first")
        yield request.chunk
    stream.check()


def _not_found(name: str) -> NotFound:
    return NotFound("NOT_FOUND", f"name names nothing that exists: {name}", metadata={"name": name})
