"""Notes uploads of models, and removes what those left that did not end. Not pure: database, artifact store.

Imported adapters that were deleted are noted as uploads that did not end. It refuses to know what an import is.
"""

from __future__ import annotations

import structlog

from chassis.db.pool import Connection, Pool, database_is_away, transaction
from chassis.errors import Unavailable, is_away
from chassis.ids import Ids
from chassis.objects.object_store import ObjectStore
from services.inference.config import InferenceSettings
from services.inference.models.store import UploadStore

log = structlog.get_logger()

LIST_BATCH_MAX = 1000


class BaseUploads:
    """`begin`, then `finish` in the transaction that lists the model, or `collect`; `collect_dead` for dead ones."""

    def __init__(self, pool: Pool, objects: ObjectStore, *, settings: InferenceSettings, ids: Ids) -> None:
        self._pool = pool
        self._objects = objects
        self._settings = settings
        self._ids = ids

    async def begin(self, key: str) -> str:
        """Before the first byte: whatever happens to this process, its files are found. Unavailable while others are
        removed under this key."""
        upload_id = self._ids.new("upload")
        async with transaction(self._pool) as connection:
            if not await UploadStore(connection).begin(upload_id, key):
                raise Unavailable(
                    "DEPENDENCY_UNAVAILABLE",
                    f"what an earlier import left under {key} is being removed; import again in a moment",
                    retry_after_s=self._settings.leftover_claim_s,
                )
        return upload_id

    async def finish(self, connection: Connection, upload_id: str, key: str) -> bool:
        """False when it took so long that its files are being removed."""
        return await UploadStore(connection).finish(upload_id, key)

    async def collect(self, upload_id: str) -> None:
        """Removes the files of an upload that did not end, unless a listed model or another upload has them, too."""
        async with transaction(self._pool) as connection:
            key = await UploadStore(connection).claim(upload_id, self._upload_s_max)
        if key is None:
            return
        keys = [found async for found in self._objects.list_keys(key, batch_max=LIST_BATCH_MAX)]
        for found in keys:
            await self._objects.remove(found)
        await self._objects.tidy(key)
        async with self._pool.acquire() as connection:
            await UploadStore(connection).forget(upload_id)
        log.info("base_upload_removed", artifact_key=key, files=len(keys))

    @property
    def _upload_s_max(self) -> float:
        """An upload that is older has died."""
        return self._settings.import_store_s_max + self._settings.leftover_claim_s

    async def collect_dead(self) -> None:
        settings = self._settings
        async with self._pool.acquire() as connection:
            dead = await UploadStore(connection).list_dead(
                upload_s_max=self._upload_s_max,
                claim_s=settings.leftover_claim_s,
                batch_max=settings.leftovers_batch_max,
            )
        for upload_id in dead:
            await self.collect(upload_id)


def is_passing(error: Exception) -> bool:
    """Whether database or artifact store are away and the same work may succeed later."""
    return is_away(error) or database_is_away(error)
