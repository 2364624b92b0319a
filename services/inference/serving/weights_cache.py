"""Keeps local copies of weights, complete and checked or not there at all. Not pure: disk, artifact store.

It knows no model and no engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from chassis.errors import DataLoss
from chassis.objects.object_store import ObjectStore
from formats.manifests import FileDigest
from services.inference.config import InferenceSettings
from services.inference.models.domain import Weights
from services.inference.serving import weights_folders


@dataclass(kw_only=True, eq=False)
class _Held:
    """A folder that this process uses, or will as soon as it is there; the task gives the descriptor that keeps it."""

    taking: asyncio.Task[int]
    users: int = 0


class WeightsCache:
    """A folder per revision, of `weights_cache_bytes_max` together: the longest unused ones make room, and none that is
    in use. Several processes may share it: a folder appears and goes by one rename."""

    def __init__(self, settings: InferenceSettings, objects: ObjectStore) -> None:
        self._root = settings.data_dir / "weights"
        self._objects = objects
        self._chunk_bytes_max = settings.chunk_bytes_max
        self._bytes_max = settings.weights_cache_bytes_max
        self._held: dict[str, _Held] = {}

    async def tidy(self) -> None:
        """Deletes what earlier processes left unfinished, and what is beyond the limit."""
        await asyncio.to_thread(weights_folders.tidy, self._root, self._bytes_max)

    @asynccontextmanager
    async def use(self, weights: Weights) -> AsyncIterator[Path]:
        """The local folder of these weights, which stays for the length of the block. It is downloaded when needed,
        once for all callers; ResourceExhausted when there is no room for it."""
        held = self._held.get(weights.revision)
        if held is None:
            held = _Held(taking=asyncio.create_task(self._take(weights)))
            self._held[weights.revision] = held
            held.taking.add_done_callback(lambda _: self._let_go(weights.revision, held))
        held.users += 1
        try:
            # Shielded: one caller that goes away must not end the download of the others.
            await asyncio.shield(held.taking)
            yield self._root / weights.revision
        finally:
            held.users -= 1
            self._let_go(weights.revision, held)

    def _let_go(self, revision: str, held: _Held) -> None:
        """After the last user; a download that nobody waits for any more goes on for the next one."""
        if held.users or not held.taking.done() or self._held.get(revision) is not held:
            return
        del self._held[revision]
        if not held.taking.cancelled() and held.taking.exception() is None:
            # In a thread: a disk that stalls must not stop everybody.
            asyncio.get_running_loop().run_in_executor(None, _close, held.taking.result())

    async def _take(self, weights: Weights) -> int:
        target = self._root / weights.revision
        while (descriptor := await asyncio.to_thread(weights_folders.hold, target)) is None:
            await self._download(weights, target)
        return descriptor

    async def _download(self, weights: Weights, target: Path) -> None:
        size_bytes = sum(file.size_bytes for file in weights.files)
        partial, descriptor = await asyncio.to_thread(
            weights_folders.reserve, self._root, weights.revision, size_bytes, self._bytes_max
        )
        try:
            for file in weights.files:
                await self._download_file(weights.key, file, partial / file.path)
            await asyncio.to_thread(weights_folders.publish, partial, target)
        finally:
            await asyncio.to_thread(weights_folders.discard, partial, descriptor)

    async def _download_file(self, key: str, file: FileDigest, target: Path) -> None:
        digest = hashlib.sha256()
        with target.open("xb") as out:
            async for chunk in self._objects.read(
                key + file.path, offset_bytes=0, chunk_bytes_max=self._chunk_bytes_max
            ):
                digest.update(chunk)
                await asyncio.to_thread(out.write, chunk)
            # Before the folder gets its name: a machine that loses power must not keep the name of empty files.
            await asyncio.to_thread(_sync, out)
        if digest.hexdigest() != file.sha256:
            raise DataLoss("DATA_CORRUPT", f"{file.path} in the artifact store does not match its SHA-256")


def _sync(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())


def _close(descriptor: int) -> None:
    weights_folders.touch(descriptor)
    os.close(descriptor)
