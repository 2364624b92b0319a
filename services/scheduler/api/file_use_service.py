"""finemesh.artifacts.v1.FileUseService: which files jobs under way read. Handlers check, convert, call and answer."""

from chassis.db.pool import Pool
from chassis.errors import invalid
from finemesh.artifacts.v1 import file_use_service_pb2, file_use_service_pb2_grpc
from services.scheduler.jobs.store import JobStore

KEYS_MAX = 1000


class FileUseService(file_use_service_pb2_grpc.FileUseServiceServicer):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def ListFilesInUse(
        self, request: file_use_service_pb2.ListFilesInUseRequest, context: object
    ) -> file_use_service_pb2.ListFilesInUseResponse:
        if len(request.keys) > KEYS_MAX:
            raise invalid("keys", f"must be at most {KEYS_MAX}")
        used = await JobStore(self._pool).files_in_use(request.keys)
        return file_use_service_pb2.ListFilesInUseResponse(keys=used)
