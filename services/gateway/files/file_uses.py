"""Asks the scheduler which deleted files jobs still read. Not pure: gRPC."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from chassis.errors import Unimplemented
from finemesh.artifacts.v1 import file_use_service_pb2

if TYPE_CHECKING:
    from finemesh.artifacts.v1.file_use_service_pb2_grpc import FileUseServiceAsyncStub


class FileUses:
    def __init__(self, scheduler: "FileUseServiceAsyncStub") -> None:
        self._scheduler = scheduler

    async def used(self, keys: Sequence[str]) -> frozenset[str]:
        """Those of the keys that a job reads; all of them when a scheduler of an older version cannot tell."""
        if not keys:
            return frozenset()
        request = file_use_service_pb2.ListFilesInUseRequest(keys=keys)
        try:
            return frozenset((await self._scheduler.ListFilesInUse(request)).keys)
        except Unimplemented:
            return frozenset(keys)
