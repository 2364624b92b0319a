"""Keeps local copies of weights, complete and checked or not there at all. Not pure: disk, artifact store.

It knows no model and no engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import uuid
from pathlib import Path

from chassis.errors import DataLoss
from chassis.objects.object_store import ObjectStore
from formats.manifests import FileDigest
from services.inference.models.domain import Weights


class WeightsCache:
    """A folder per revision. Several processes may share it: a folder appears by one rename."""

    def __init__(self, root: Path, objects: ObjectStore, *, chunk_bytes_max: int) -> None:
        self._root = root
        self._objects = objects
        self._chunk_bytes_max = chunk_bytes_max
        self._fetching: dict[str, asyncio.Task[Path]] = {}

    async def fetch(self, weights: Weights) -> Path:
        """The local folder of these weights, downloaded when needed; concurrent callers share one download."""
        target = self._root / weights.revision
        if await asyncio.to_thread(target.is_dir):
            return target
        task = self._fetching.get(weights.revision)
        if task is None:
            task = asyncio.create_task(self._download(weights, target))
            self._fetching[weights.revision] = task
            task.add_done_callback(lambda _: self._fetching.pop(weights.revision, None))
        # Shielded: one caller that goes away must not end the download of the others.
        return await asyncio.shield(task)

    async def _download(self, weights: Weights, target: Path) -> Path:
        partial = self._root / f".{weights.revision}-{uuid.uuid4().hex}"
        await asyncio.to_thread(partial.mkdir, parents=True)
        try:
            for file in weights.files:
                await self._download_file(weights.key, file, partial / file.path)
            return await asyncio.to_thread(_publish, partial, target)
        finally:
            await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)

    async def _download_file(self, key: str, file: FileDigest, target: Path) -> None:
        digest = hashlib.sha256()
        with target.open("xb") as out:
            async for chunk in self._objects.read(
                key + file.path, offset_bytes=0, chunk_bytes_max=self._chunk_bytes_max
            ):
                digest.update(chunk)
                await asyncio.to_thread(out.write, chunk)
        if digest.hexdigest() != file.sha256:
            raise DataLoss("DATA_CORRUPT", f"{file.path} in the artifact store does not match its SHA-256")


def _publish(partial: Path, target: Path) -> Path:
    """Gives the finished folder its name; another process may have been first with the same contents."""
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    return target
