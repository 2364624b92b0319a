"""Takes the bytes of one upload into the artifact store in bounded memory. Not pure: artifact store.

They are hashed and checked on the way. Nothing is stored unless the stream ends well and is what its header announced.
It knows no table and no tenant.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from chassis.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, invalid
from chassis.objects.object_store import ObjectStore
from services.gateway.files.content_check import ContentCheck, ParquetLimits
from services.gateway.files.line_check import DatasetLimits, DatasetReport


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    size_bytes_max: int
    chunk_bytes_max: int
    idle_s_max: float
    dataset: DatasetLimits
    parquet: ParquetLimits


@dataclass(frozen=True, kw_only=True)
class Announced:
    """What the header says of the content; `size_bytes` 0 and `sha256` "" say nothing."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Received:
    size_bytes: int
    sha256: str
    report: DatasetReport


class UploadStream:
    """One upload, used once."""

    def __init__(self, announced: Announced, limits: UploadLimits) -> None:
        self._announced = announced
        self._limits = limits
        self._size_bytes = 0
        self._digest = hashlib.sha256()
        self._check = ContentCheck(limits.dataset, limits.parquet)
        self._failure: Exception | None = None

    async def receive(
        self,
        chunks: AsyncIterator[bytes],
        artifacts: ObjectStore,
        key: str,
    ) -> Received:
        """`chunks` must raise when the sender is gone: a stream that broke is not one that ended."""
        try:
            await artifacts.put(key, self._examined(chunks))
            report = await asyncio.to_thread(self._check.finish)
        except Exception:
            # The store may tell of a failed stream in its own words; the reason is what failed the stream.
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            self._check.close()
        return Received(size_bytes=self._size_bytes, sha256=self._digest.hexdigest(), report=report)

    async def _examined(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            while True:
                chunk = await self._next(chunks)
                if chunk is None:
                    break
                self._count(chunk)
                await asyncio.to_thread(self._examine, chunk)
                if chunk:
                    yield chunk
            self._compare()
        except Exception as error:
            self._failure = error
            raise

    async def _next(self, chunks: AsyncIterator[bytes]) -> bytes | None:
        try:
            async with asyncio.timeout(self._limits.idle_s_max):
                return await anext(chunks, None)
        except TimeoutError as error:
            idle_s = self._limits.idle_s_max
            message = f"no chunk came for {idle_s:g} seconds; send the file again without such a pause"
            raise DeadlineExceeded("DEADLINE_TOO_SHORT", message, metadata={"limit": "upload_idle_s_max"}) from error

    def _examine(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self._check.feed(chunk)

    def _count(self, chunk: bytes) -> None:
        if len(chunk) > self._limits.chunk_bytes_max:
            raise size_limit("a chunk", "chunk_bytes_max", len(chunk), self._limits.chunk_bytes_max)
        self._size_bytes += len(chunk)
        if self._size_bytes > self._limits.size_bytes_max:
            raise size_limit("the file", "file_size_bytes_max", self._size_bytes, self._limits.size_bytes_max)
        if 0 < self._announced.size_bytes < self._size_bytes:
            raise self._mismatch("header.size_bytes", f"{self._announced.size_bytes} bytes", "more")

    def _compare(self) -> None:
        announced = self._announced
        if announced.size_bytes and announced.size_bytes != self._size_bytes:
            raise self._mismatch("header.size_bytes", f"{announced.size_bytes} bytes", f"{self._size_bytes} bytes")
        if announced.sha256 and announced.sha256 != self._digest.hexdigest():
            raise self._mismatch("header.sha256", f"SHA-256 {announced.sha256}", self._digest.hexdigest())

    @staticmethod
    def _mismatch(field: str, announced: str, found: str) -> InvalidArgument:
        return invalid(
            field,
            f"announced {announced}, received {found}",
            message=f"the header announced {announced} and the stream had {found}; nothing was kept, "
            "send the file again",
            reason="DIGEST_MISMATCH",
        )


def size_limit(what: str, limit: str, size_bytes: int, limit_bytes: int) -> ResourceExhausted:
    """`limit` is the name of the setting."""
    return ResourceExhausted(
        "SIZE_LIMIT",
        f"{what} has {size_bytes} bytes or more and the limit {limit} is {limit_bytes}; send less",
        metadata={"limit": limit, "limit_bytes": str(limit_bytes), "size_bytes": str(size_bytes)},
    )
