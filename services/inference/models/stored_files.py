"""Brings the files of an import to local disk, and from there into the artifact store. Not pure: disk, artifact store.

Whatever happens, nothing is left of an import that was not listed. It refuses to know what the files mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import structlog

from chassis.errors import DeadlineExceeded, InvalidArgument
from chassis.objects.object_store import ObjectStore
from formats.manifests import FileDigest
from services.inference.config import InferenceSettings
from services.inference.models.base_uploads import BaseUploads, is_passing
from services.inference.models.domain import Weights
from services.inference.models.spool import ModelSpool

log = structlog.get_logger()


async def spool_files(parts: AsyncIterator[object], spool: ModelSpool) -> None:
    """All files of an import on local disk, each checked; `parts` are announcements and their chunks."""
    try:
        async for part in parts:
            match part:
                case FileDigest():
                    await spool.begin(part.path, part.size_bytes, part.sha256)
                case bytes():
                    await spool.write(part)
                case _:
                    raise InvalidArgument("INVALID_FIELD", "after the header an import has only files and chunks")
        await spool.end_file()
    finally:
        await spool.close()


class StoredFiles:
    """Puts the files of imports into the store, each set under a key of its own."""

    def __init__(self, objects: ObjectStore, uploads: BaseUploads, settings: InferenceSettings) -> None:
        self._objects = objects
        self._uploads = uploads
        self._settings = settings

    async def keep(self, weights: Weights, folder: Path, list_model: Callable[[str], Awaitable[None]]) -> None:
        """Stores the files and has them listed: `list_model` gets the id of the upload, which it ends in its own
        transaction."""
        upload_id = await self._uploads.begin(weights.key)
        try:
            await self._store(weights, folder)
            await list_model(upload_id)
        except BaseException:
            # Shielded: also a cancelled import cleans up after itself.
            await asyncio.shield(self._discard(upload_id))
            raise

    async def _store(self, weights: Weights, folder: Path) -> None:
        seconds_max = self._settings.import_store_s_max
        try:
            async with asyncio.timeout(seconds_max):
                for file in weights.files:
                    await self._objects.put(weights.key + file.path, self._read(folder / file.path))
        except TimeoutError as error:
            message = (
                f"storing the files took longer than import_store_s_max, {seconds_max:g} seconds; nothing was kept"
            )
            limit = {"limit": "import_store_s_max"}
            raise DeadlineExceeded("DEADLINE_TOO_SHORT", message, metadata=limit) from error

    async def _discard(self, upload_id: str) -> None:
        try:
            await self._uploads.collect(upload_id)
        except Exception as error:
            if not is_passing(error):
                raise
            log.warning("base_upload_left", upload=upload_id, error=repr(error))

    async def _read(self, path: Path) -> AsyncIterator[bytes]:
        with path.open("rb") as source:
            while chunk := await asyncio.to_thread(source.read, self._settings.chunk_bytes_max):
                yield chunk
