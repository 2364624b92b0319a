"""Takes the bytes of one upload into the artifact store in bounded memory. Not pure: artifact store.

They are hashed and checked on the way. Nothing is stored unless the stream ends well and is what its header announced.
It knows no table and no tenant.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from chassis.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, invalid
from chassis.objects.object_store import ObjectStore
from services.gateway.files.content_check import ContentCheck, ProcessLimits
from services.gateway.files.dataset_report import DatasetLimits, DatasetReport

Result = TypeVar("Result")
# Small chunks are gathered up to this, so that a stream of them costs little more than one of large ones.
_BLOCK_BYTES = 512 * 1024


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """A stream that brings fewer than `idle_bytes_min` while it is waited for `idle_s_max` is idle."""

    size_bytes_max: int
    chunk_bytes_max: int
    idle_s_max: float
    idle_bytes_min: int
    dataset: DatasetLimits
    process: ProcessLimits


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where the work on uploads is done: threads of their own, and a place to wait for before a check of a whole file.

    `grow` is told how many bytes have come before they are stored, and may refuse them.
    """

    threads: Executor
    check_place: Callable[[], AbstractAsyncContextManager[None]]
    grow: Callable[[int], Awaitable[None]]

    async def run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


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

    def __init__(self, announced: Announced, limits: UploadLimits, workshop: Workshop) -> None:
        self._announced = announced
        self._limits = limits
        self._workshop = workshop
        self._size_bytes = 0
        self._patience_s = limits.idle_s_max
        self._bytes_since_patience = 0
        self._digest = hashlib.sha256()
        self._check = ContentCheck(limits.dataset, limits.process)
        self._failure: Exception | None = None

    async def receive(
        self,
        chunks: AsyncIterator[bytes],
        artifacts: ObjectStore,
        key: str,
    ) -> Received:
        """`chunks` must raise when the sender is gone: a stream that broke is not one that ended."""
        try:
            await artifacts.put(key, self._examined(chunks), synced=True)
            report = await self._report()
        except Exception:
            # The store may tell of a failed stream in its own words; the reason is what failed the stream.
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            self._check.close()
        return Received(size_bytes=self._size_bytes, sha256=self._digest.hexdigest(), report=report)

    async def _report(self) -> DatasetReport:
        if not self._check.is_parquet:
            # Nearly all of the check was done while the bytes came.
            return await self._workshop.run(self._check.finish)
        async with self._workshop.check_place():
            return await self._workshop.run(self._check.finish)

    async def _examined(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The bytes in blocks. One block is hashed and checked while the next one comes and the store writes."""
        examined: asyncio.Future[None] | None = None
        try:
            async for block in self._blocks(chunks):
                await self._workshop.grow(self._size_bytes)
                if examined is not None:
                    await examined
                examined = asyncio.ensure_future(self._workshop.run(partial(self._examine, block)))
                yield block
            if examined is not None:
                await examined
            self._compare()
        except Exception as error:
            self._failure = error
            raise

    async def _blocks(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        gathered: list[bytes] = []
        gathered_bytes = 0
        while (chunk := await self._next(chunks)) is not None:
            self._count(chunk)
            gathered.append(chunk)
            gathered_bytes += len(chunk)
            if gathered_bytes >= _BLOCK_BYTES:
                yield chunk if len(gathered) == 1 else b"".join(gathered)
                gathered.clear()
                gathered_bytes = 0
        if gathered:
            yield b"".join(gathered)

    async def _next(self, chunks: AsyncIterator[bytes]) -> bytes | None:
        """A chunk that has bytes; None at the end. Waiting uses up patience, and only bytes give it back."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(self._patience_s):
                chunk = await anext(chunks, None)
                while chunk == b"":
                    chunk = await anext(chunks, None)
        except TimeoutError as error:
            limits = self._limits
            raise DeadlineExceeded(
                "DEADLINE_TOO_SHORT",
                f"the upload brought fewer than {limits.idle_bytes_min} bytes (upload_idle_bytes_min) in "
                f"{limits.idle_s_max:g} seconds (upload_idle_s_max); send the file again without such a pause",
                metadata={"limit": "upload_idle_s_max"},
            ) from error
        self._patience_s -= loop.time() - began_s
        self._bytes_since_patience += len(chunk or b"")
        if self._bytes_since_patience >= self._limits.idle_bytes_min:
            self._patience_s, self._bytes_since_patience = self._limits.idle_s_max, 0
        return chunk

    def _examine(self, block: bytes) -> None:
        self._digest.update(block)
        self._check.feed(block)

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
