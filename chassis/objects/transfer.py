"""Not pure: files. Carries whole files between a folder and the object store, checked by size and SHA-256.

It knows no manifest: whoever calls says what each file must be.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import IO, Any

from chassis.clock import Clock
from chassis.errors import DataLoss, invalid
from chassis.objects.object_keys import FileEntry, checked_path, key_of
from chassis.objects.object_store import ObjectMissing, ObjectStore
from chassis.rpc.retry import retry

_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileTransfer:
    """Calls that fail because the store is away are repeated, then end in Unavailable."""

    def __init__(
        self, store: ObjectStore, clock: Clock, *, chunk_bytes: int, concurrent_max: int, attempts_max: int
    ) -> None:
        self._store = store
        self._clock = clock
        self._chunk_bytes = chunk_bytes
        self._concurrent_max = concurrent_max
        self._attempts_max = attempts_max

    async def download(self, key: str, file: FileEntry, target: Path) -> None:
        """Writes and syncs `target`. DataLoss when the stored bytes are missing or not the recorded ones."""
        if not _SHA256.fullmatch(file.sha256):
            rule = "must be 64 lower-case hex digits"
            raise invalid("artifact.files.sha256", rule, message=f"the digest of {key} {rule}")
        await retry(lambda: self._download(key, file, target), clock=self._clock, attempts=self._attempts_max)

    async def upload(self, source: Path, key: str, file: FileEntry) -> None:
        """Stores `source` whole or not at all. DataLoss when its bytes are not those that `file` announces."""
        checked_path(key)
        await retry(
            lambda: self._store.put(key, self._verified_chunks(source, key, file)),
            clock=self._clock,
            attempts=self._attempts_max,
        )

    async def upload_all(self, folder: Path, prefix: str, files: Sequence[FileEntry]) -> None:
        """All of `files`, a few at a time; the first error stops the rest."""
        slots = asyncio.Semaphore(self._concurrent_max)

        async def one(file: FileEntry) -> None:
            key = key_of(prefix, file)
            async with slots:
                await self.upload(folder / checked_path(file.path), key, file)

        await all_or_first_error([one(file) for file in files])

    async def download_all(self, prefix: str, files: Sequence[FileEntry], folder: Path) -> None:
        """As `upload_all`, the other way."""
        slots = asyncio.Semaphore(self._concurrent_max)

        async def one(file: FileEntry) -> None:
            key, target = key_of(prefix, file), folder / checked_path(file.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            async with slots:
                await self.download(key, file, target)

        await all_or_first_error([one(file) for file in files])

    async def delete(self, keys: Sequence[str]) -> None:
        """Removes what is there; what is gone already is no error."""
        for key in keys:
            await self._store.remove(checked_path(key))

    async def _download(self, key: str, file: FileEntry, target: Path) -> None:
        digest, size_bytes = hashlib.sha256(), 0
        try:
            with await asyncio.to_thread(target.open, "wb") as output:
                async for chunk in self._store.read(key, chunk_bytes_max=self._chunk_bytes):
                    size_bytes += len(chunk)
                    if size_bytes > file.size_bytes:
                        raise _corrupt(key, f"is longer than its recorded {file.size_bytes} bytes")
                    await asyncio.to_thread(_write, output, chunk, digest)
                await asyncio.to_thread(_sync, output)
        except ObjectMissing as error:
            raise _corrupt(key, "is missing") from error
        if size_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
            raise _corrupt(key, "does not have its recorded size and SHA-256")

    async def _verified_chunks(self, source: Path, key: str, file: FileEntry) -> AsyncIterator[bytes]:
        # The check comes before the end of the stream, so that a wrong file fails the put and stores nothing.
        digest, size_bytes = hashlib.sha256(), 0
        with await asyncio.to_thread(source.open, "rb") as content:
            while chunk := await asyncio.to_thread(_read, content, self._chunk_bytes, digest):
                size_bytes += len(chunk)
                yield chunk
        if size_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
            raise _corrupt(key, "was to be stored from a file that does not have its announced size and SHA-256")


async def all_or_first_error(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs all; the first error cancels the others and is raised as it is, not as a group."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors


def _corrupt(key: str, what: str) -> DataLoss:
    return DataLoss("DATA_CORRUPT", f"{key} {what}", metadata={"key": key})


def _write(output: IO[bytes], chunk: bytes, digest: "hashlib._Hash") -> None:
    digest.update(chunk)
    output.write(chunk)


def _read(content: IO[bytes], size_bytes: int, digest: "hashlib._Hash") -> bytes:
    chunk = content.read(size_bytes)
    digest.update(chunk)
    return chunk


def _sync(output: IO[bytes]) -> None:
    output.flush()
    os.fsync(output.fileno())
