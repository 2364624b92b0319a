"""The internal FileArtifactService: where an uploaded file lies, for the services that run jobs on it."""

from typing import Any

from chassis.db.pool import Pool
from chassis.errors import FailedPrecondition, FieldViolation, NotFound
from chassis.identity import current_caller
from chassis.names import own_name, parse_name
from finemesh.artifacts.v1 import file_artifact_service_pb2, file_artifact_service_pb2_grpc
from finemesh.files.v1 import file_pb2
from services.gateway.api import convert
from services.gateway.files.domain import StoredFile
from services.gateway.files.store import FileStore

# As many as a message for people can carry; GetFile has the whole report.
_SHOWN_ERRORS_MAX = 10


class FileArtifactService(file_artifact_service_pb2_grpc.FileArtifactServiceServicer):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def ResolveFile(
        self, request: file_artifact_service_pb2.ResolveFileRequest, context: Any
    ) -> file_artifact_service_pb2.ResolveFileResponse:
        caller = current_caller()
        # A service that acts for a user sees that user's files; one that acts for itself, such as a worker, all.
        if caller.tenant:
            parts = own_name(file_pb2.File, request.name, caller)
        else:
            parts = parse_name(file_pb2.File, request.name)
        async with self._pool.acquire() as connection:
            file = await FileStore(connection).file(parts["project"], parts["file"])
        if file is None:
            raise NotFound("NOT_FOUND", f"there is no file {request.name}", metadata={"name": request.name})
        if file.state != "ready":
            raise _not_ready(request.name, file)
        return convert.resolved_file_to_proto(file)


def _not_ready(name: str, file: StoredFile) -> FailedPrecondition:
    return FailedPrecondition(
        "FILE_NOT_READY",
        f"the file {name} has {file.error_count} errors; correct its lines and upload it again",
        violations=[
            FieldViolation(f"line {error.line}: {error.path}", f"expected {error.verdict}")
            for error in file.errors[:_SHOWN_ERRORS_MAX]
        ],
        metadata={"name": name, "error_count": str(file.error_count)},
    )
