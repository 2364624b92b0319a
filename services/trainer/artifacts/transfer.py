"""Moves files to and from the artifact store, checked by SHA-256. Not pure: the object store, files.

Files are streamed, so that memory stays bounded. It knows keys and digests; what a file means is for others. A key or
path that could leave its folder is refused.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import obstore
import structlog
from obstore.exceptions import BaseError as StoreError
from obstore.store import from_url

from chassis.clock import Clock
from chassis.errors import DataLoss, FieldViolation, InvalidArgument, Unavailable
from chassis.rpc.retry import retry

log = structlog.get_logger()

KEY_CHARS_MAX = 1024
_SEGMENT = re.compile(r"[A-Za-z0-9._+=@~-]{1,255}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file below a key prefix; `path` is empty when the key is the whole name."""

    path: str
    size_bytes: int
    sha256: str


def checked_path(path: str) -> str:
    """`path` when it is relative, plain and stays where it is put; InvalidArgument otherwise."""
    segments = path.split("/")
    sound = len(path) <= KEY_CHARS_MAX and all(
        _SEGMENT.fullmatch(segment) and segment not in (".", "..") for segment in segments
    )
    if not sound:
        rule = "must be a relative path of plain names (letters, digits and ._+=@~-) without `..`"
        raise InvalidArgument(
            "INVALID_FIELD", f"{path[:200]!r} {rule}", violations=[FieldViolation("artifact.files.path", rule)]
        )
    return path


def key_of(prefix: str, file: StoredFile) -> str:
    """The whole key of `file` under an artifact's `prefix`, checked."""
    if not file.path:
        return checked_path(prefix)
    if not prefix.endswith("/"):
        rule = "must end in `/` for an artifact of several files"
        raise InvalidArgument(
            "INVALID_FIELD", f"the artifact key {rule}", violations=[FieldViolation("artifact.key", rule)]
        )
    return checked_path(prefix + file.path)


class ArtifactStore:
    """One root URL. Calls that fail because the store is away are repeated, then end in Unavailable."""

    def __init__(self, url: str, clock: Clock, *, chunk_bytes: int, concurrent_max: int, attempts_max: int) -> None:
        self._store = from_url(url, mkdir=True) if url.startswith("file:") else from_url(url)
        self._clock = clock
        self._chunk_bytes = chunk_bytes
        self._concurrent_max = concurrent_max
        self._attempts_max = attempts_max

    async def download(self, key: str, file: StoredFile, target: Path) -> None:
        """Writes and syncs `target`. DataLoss when the stored bytes are missing or not the recorded ones."""
        if not _SHA256.fullmatch(file.sha256):
            rule = "must be 64 lower-case hex digits"
            raise InvalidArgument(
                "INVALID_FIELD",
                f"the digest of {key} {rule}",
                violations=[FieldViolation("artifact.files.sha256", rule)],
            )
        await retry(lambda: self._download(key, file, target), clock=self._clock, attempts=self._attempts_max)

    async def upload(self, source: Path, key: str, file: StoredFile) -> None:
        """Stores `source` whole or not at all. DataLoss when its bytes are not those that `file` announces."""
        checked_path(key)
        await retry(lambda: self._upload(source, key, file), clock=self._clock, attempts=self._attempts_max)

    async def upload_all(self, folder: Path, prefix: str, files: Sequence[StoredFile]) -> None:
        """All of `files`, a few at a time; the first error stops the rest."""
        slots = asyncio.Semaphore(self._concurrent_max)

        async def one(file: StoredFile) -> None:
            key = key_of(prefix, file)
            async with slots:
                await self.upload(folder / checked_path(file.path), key, file)

        await all_or_first_error([one(file) for file in files])

    async def download_all(self, prefix: str, files: Sequence[StoredFile], folder: Path) -> None:
        """As `upload_all`, the other way."""
        slots = asyncio.Semaphore(self._concurrent_max)

        async def one(file: StoredFile) -> None:
            key, target = key_of(prefix, file), folder / checked_path(file.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            async with slots:
                await self.download(key, file, target)

        await all_or_first_error([one(file) for file in files])

    async def delete(self, keys: Sequence[str]) -> None:
        """Removes what is there; what is gone already is no error."""
        for key in keys:
            try:
                await obstore.delete_async(self._store, [checked_path(key)])
            except FileNotFoundError:
                continue
            except StoreError as error:
                raise _store_away(key) from error

    async def _download(self, key: str, file: StoredFile, target: Path) -> None:
        digest, size_bytes = hashlib.sha256(), 0
        try:
            answer = await obstore.get_async(self._store, key)
            with await asyncio.to_thread(target.open, "wb") as output:
                async for chunk in answer.stream(min_chunk_size=self._chunk_bytes):
                    size_bytes += len(chunk)
                    if size_bytes > file.size_bytes:
                        raise _corrupt(key, f"is longer than its recorded {file.size_bytes} bytes")
                    await asyncio.to_thread(_write, output, chunk, digest)
                await asyncio.to_thread(_sync, output)
        except FileNotFoundError as error:
            raise _corrupt(key, "is missing") from error
        except StoreError as error:
            raise _store_away(key) from error
        if size_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
            raise _corrupt(key, "does not have its recorded size and SHA-256")

    async def _upload(self, source: Path, key: str, file: StoredFile) -> None:
        try:
            await obstore.put_async(
                self._store,
                key,
                self._verified_chunks(source, key, file),
                chunk_size=self._chunk_bytes,
                max_concurrency=2,
            )
        except StoreError as error:
            raise _store_away(key) from error

    async def _verified_chunks(self, source: Path, key: str, file: StoredFile) -> AsyncIterator[bytes]:
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


def _store_away(key: str) -> Unavailable:
    return Unavailable("DEPENDENCY_UNAVAILABLE", f"the artifact store cannot be reached for {key}")


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
