"""Not pure: object store. One store (a folder, S3, GCS, Azure) as a place for streams: put, read, remove."""

import asyncio
import contextlib
import glob
import itertools
import os
import re
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, from_url

from chassis.errors import DataLoss, DomainError, Unavailable, disk_full, is_disk_full

# S3 refuses smaller parts of a multipart upload, but for the last one.
PART_BYTES_MIN = 5 * 1024**2
# How long an upload that its caller gave up may take to remove its parts; what is left is for the bucket's rule.
ABORT_S_MAX = 5.0
# Bytes of a local upload after which what came is written to the disk, and how many are at a time.
_WRITE_BACK_BYTES = 64 * 1024**2
_SYNCS_MAX = 4
# A local upload under way: `<name>#<n>`.
_STAGED = re.compile(r".+#\d+")
# How obstore tells the error of a local file.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class _Source:
    """Chunks that can be ended before their time, by an error."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._next: asyncio.Future[bytes | None] | None = None
        self._ended = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._ended:
            raise InterruptedError("the upload was given up")
        self._next = asyncio.ensure_future(_next_of(self._chunks))
        try:
            chunk = await self._next
        except asyncio.CancelledError:
            if self._ended:
                raise InterruptedError("the upload was given up") from None
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def end(self) -> None:
        self._ended = True
        if self._next is not None:
            self._next.cancel()


async def _next_of(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)


class ObjectMissing(DataLoss):
    """What was stored once is not there."""


class ObjectStore:
    """One store below one root; keys are relative to it. Every method raises Unavailable while the store is away,
    and `disk_full` while a local one has no room."""

    def __init__(self, url: str, *, part_bytes: int, parts_in_flight_max: int) -> None:
        # Any, because each kind of store is a class of its own.
        self._store: Any = LocalStore.from_url(url, mkdir=True) if url.startswith("file:") else from_url(url)
        self._part_bytes = part_bytes
        self._parts_in_flight_max = parts_in_flight_max
        # Of their own: a disk that is slow to sync keeps nothing else of this process waiting.
        self._syncing = ThreadPoolExecutor(_SYNCS_MAX, thread_name_prefix="sync")

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, synced: bool = False) -> None:
        """Stores the stream as a multipart upload. When `chunks` raises or the caller is cancelled, the upload is
        aborted and nothing is stored, unless all of it was there by then. With `synced` it survives a power failure
        afterwards, as in `put_synced`."""
        source = _Source(self._written_back(key, chunks) if synced and isinstance(self._store, LocalStore) else chunks)
        upload = asyncio.ensure_future(self._put(key, source))
        try:
            await asyncio.shield(upload)
        except asyncio.CancelledError:
            # obstore aborts an upload whose chunks fail. One that is cancelled it only forgets, and a bucket keeps its
            # parts.
            source.end()
            try:
                await asyncio.wait([upload], timeout=ABORT_S_MAX)
            finally:
                upload.cancel()
                await asyncio.gather(upload, return_exceptions=True)
            raise
        if synced:
            await self._sync_local(key)

    async def _put(self, key: str, chunks: AsyncIterator[bytes]) -> None:
        with _away(key):
            await obstore.put_async(
                self._store,
                key,
                chunks,
                use_multipart=True,
                chunk_size=self._part_bytes,
                max_concurrency=self._parts_in_flight_max,
            )

    async def put_synced(self, key: str, content: bytes) -> None:
        """Stores a small object whole. Afterwards it survives a power failure: a folder's files are synced to disk."""
        with _away(key):
            await obstore.put_async(self._store, key, content, use_multipart=False)
        await self._sync_local(key)

    async def read(self, key: str, *, offset_bytes: int = 0, chunk_bytes_max: int) -> AsyncIterator[bytes]:
        """The stored bytes from the offset on, in chunks of at most `chunk_bytes_max`; ObjectMissing without any."""
        options = {"range": {"offset": offset_bytes}} if offset_bytes else {}
        try:
            with _away(key):
                found = await obstore.get_async(self._store, key, options=options)
        except FileNotFoundError as error:
            raise ObjectMissing("DATA_CORRUPT", "the stored bytes are gone", metadata={"key": key}) from error
        pieces = aiter(found.stream(min_chunk_size=chunk_bytes_max))
        while True:
            # Not around the `yield`: what the reader of the chunks raises is not the store's.
            with _away(key):
                piece = await anext(pieces, None)
            if piece is None:
                return
            view = memoryview(piece)
            for start in range(0, len(view), chunk_bytes_max):
                yield bytes(view[start : start + chunk_bytes_max])

    async def list_keys(self, prefix: str, *, batch_max: int) -> AsyncIterator[str]:
        """Keys below the prefix, in no order."""
        with _away(prefix):
            found = obstore.list(self._store, prefix, chunk_size=batch_max)
        while True:
            with _away(prefix):
                batch = await anext(found, None)
            if batch is None:
                return
            for entry in batch:
                yield entry["path"]

    async def tidy(self, prefix: str) -> None:
        """Removes what killed uploads left below a prefix where nobody writes any more, and folders that are empty.

        Only a local store has either.
        """
        if isinstance(self._store, LocalStore) and self._store.prefix is not None:
            await asyncio.to_thread(_tidy, Path(self._store.prefix) / prefix)

    async def remove(self, key: str) -> None:
        """Removes the bytes, also those of an upload that its process left half done; fine when there are none."""
        with contextlib.suppress(FileNotFoundError), _away(key):
            await obstore.delete_async(self._store, key)
        if isinstance(self._store, LocalStore) and self._store.prefix is not None:
            self._remove_staged(Path(self._store.prefix) / key)

    async def _sync_local(self, key: str) -> None:
        if isinstance(self._store, LocalStore) and self._store.prefix is not None:
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._syncing, _sync, Path(self._store.prefix), key)
            except OSError as error:
                raise _failed(error, f"{key} cannot be synced to disk") from error

    async def _written_back(self, key: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The chunks. What is stored of them goes to the disk while more come, so the last sync has little left."""
        loop, path = asyncio.get_running_loop(), Path(self._store.prefix) / key
        unsynced_bytes = 0
        syncing: asyncio.Future[None] | None = None
        async for chunk in chunks:
            yield chunk
            unsynced_bytes += len(chunk)
            if unsynced_bytes >= _WRITE_BACK_BYTES and (syncing is None or syncing.done()):
                syncing = loop.run_in_executor(self._syncing, _sync_staged, path)
                unsynced_bytes = 0

    @staticmethod
    def _remove_staged(path: Path) -> None:
        # A local multipart upload grows in `<key>#<n>` until it is renamed; a killed process leaves that behind.
        # Object stores drop theirs by a lifecycle rule on incomplete multipart uploads.
        for staged in _staged(path):
            staged.unlink(missing_ok=True)


def _staged(path: Path) -> Iterator[Path]:
    return path.parent.glob(f"{glob.escape(path.name)}#*")


def _sync_staged(path: Path) -> None:
    """What is there of a local upload under way. It only saves time: who needs it on the disk syncs it at its end."""
    with contextlib.suppress(OSError):
        for staged in _staged(path):
            descriptor = os.open(staged, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)


def _sync(root: Path, key: str) -> None:
    """The file and every folder on the way to it: a name is durable when its folder is."""
    path = root / key
    for place in (path, *itertools.takewhile(lambda folder: folder != root.parent, path.parents)):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _tidy(folder: Path) -> None:
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            if _STAGED.fullmatch(name):
                (Path(path) / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            Path(path).rmdir()


@contextlib.contextmanager
def _away(key: str) -> Iterator[None]:
    """The store's own errors as typed ones; but a missing object is a FileNotFoundError, whichever store says so."""
    try:
        yield
    except NotFoundError as error:
        raise FileNotFoundError(key) from error
    except BaseError as error:
        told = _OS_ERROR.search(str(error))
        cause = OSError(int(told[1]), str(error)) if told else error
        raise _failed(cause, f"the artifact store cannot be reached for {key}") from error


def _failed(error: Exception, message: str) -> DomainError:
    full = is_disk_full(error)
    return disk_full("the disk of the artifact store") if full else Unavailable("DEPENDENCY_UNAVAILABLE", message)
