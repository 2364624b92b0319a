"""What an upload may still store of its project's quota, reserved before the bytes come. Not pure: database.

Reservations of all replicas are rows beside each other and are made under a lock on the project's row, so uploads at
once cannot exceed the quota together. One ends with its upload, or by the database's clock when its process died.
"""

from chassis.db.pool import Pool, transaction
from chassis.errors import NotFound, ResourceExhausted
from services.gateway.config import GatewaySettings
from services.gateway.files.domain import Storage, StorageQuota
from services.gateway.files.store import FileStore


class ReservationOver(Exception):
    """Its time is over; the bytes may be removed already."""


class Reservation:
    """Of one upload, under the key of its bytes. `grow` it before more is stored than was announced."""

    def __init__(self, pool: Pool, project_id: str, key: str, settings: GatewaySettings) -> None:
        self._pool = pool
        self._project_id = project_id
        self._key = key
        self._settings = settings
        self._size_bytes = 0

    async def begin(self, announced_bytes: int) -> None:
        """ResourceExhausted when a file of this size, or any file where none is announced, has no room."""
        # Whatever happens to this process, the garbage collection finds what the upload left.
        delay_s = self._settings.upload_s_max + self._settings.sweep_claim_s
        async with transaction(self._pool) as connection:
            store = FileStore(connection)
            storage = await self._locked(store)
            if storage.file_count >= storage.file_count_max:
                raise _exceeded(storage, announced_bytes, "file_count")
            left_bytes = storage.size_bytes_max - storage.size_bytes
            size_bytes = announced_bytes or max(0, min(left_bytes, self._settings.upload_reserve_bytes))
            if size_bytes > left_bytes and size_bytes:
                raise _exceeded(storage, announced_bytes, "size_bytes")
            await store.add_reservation(self._key, delay_s, self._project_id, size_bytes)
        self._size_bytes = size_bytes

    async def grow(self, size_bytes: int) -> None:
        """Room for so much in all. ResourceExhausted when there is none, ReservationOver when it came too late."""
        if size_bytes <= self._size_bytes:
            return
        async with transaction(self._pool) as connection:
            store = FileStore(connection)
            storage = await self._locked(store)
            left_bytes = storage.size_bytes_max - storage.size_bytes + self._size_bytes
            if size_bytes > left_bytes:
                raise _exceeded(storage, size_bytes - self._size_bytes, "size_bytes")
            size_bytes = min(left_bytes, size_bytes + self._settings.upload_reserve_bytes)
            if not await store.grow_reservation(self._key, size_bytes):
                raise ReservationOver
        self._size_bytes = size_bytes

    async def _locked(self, store: FileStore) -> Storage:
        await store.lock_storage(self._project_id)
        # A statement of its own: it sees what others reserved while this one waited for the lock.
        storage = await store.storage(self._project_id, default_quota(self._settings))
        if storage is None:
            raise NotFound("NOT_FOUND", "the project does not exist")
        return storage


def default_quota(settings: GatewaySettings) -> StorageQuota:
    return StorageQuota(size_bytes_max=settings.project_bytes_max, file_count_max=settings.project_files_max)


def _exceeded(storage: Storage, wanted_bytes: int, limit: str) -> ResourceExhausted:
    if limit == "file_count":
        what = f"{storage.file_count} files, and may have {storage.file_count_max}"
    else:
        left_bytes = max(0, storage.size_bytes_max - storage.size_bytes)
        what = (
            f"{storage.size_bytes} bytes with uploads under way, and may store {storage.size_bytes_max}; "
            f"{left_bytes} are left and {wanted_bytes} more were wanted"
        )
    return ResourceExhausted(
        "QUOTA_EXCEEDED",
        f"the project has {what}. Delete files, or ask an operator for a larger quota",
        metadata={
            "limit": "project_files_max" if limit == "file_count" else "project_bytes_max",
            "size_bytes": str(storage.size_bytes),
            "size_bytes_max": str(storage.size_bytes_max),
            "file_count": str(storage.file_count),
            "file_count_max": str(storage.file_count_max),
        },
    )
