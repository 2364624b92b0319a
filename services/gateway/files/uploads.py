"""Makes a file of an upload, or leaves no trace of it. Not pure: database, artifact store.

The bytes go into the artifact store first; then one transaction gives them a row.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import Aborted, DeadlineExceeded
from chassis.ids import Ids
from chassis.objects.object_store import ObjectStore
from services.gateway.config import GatewaySettings
from services.gateway.files.artifact_gc import ArtifactCollector, is_passing
from services.gateway.files.content_check import ProcessLimits
from services.gateway.files.dataset_report import DatasetLimits
from services.gateway.files.domain import StoredFile, artifact_key
from services.gateway.files.reservation import Reservation, ReservationOver
from services.gateway.files.store import FileStore
from services.gateway.files.upload_places import CheckPlaces, Uploader, UploadSlots
from services.gateway.files.upload_stream import Announced, Received, UploadLimits, UploadStream, Workshop
from services.gateway.requests import idempotency
from services.gateway.requests.idempotency import Request

log = structlog.get_logger()


def upload_limits(settings: GatewaySettings) -> UploadLimits:
    """What one upload may bring and take, by the settings."""
    return UploadLimits(
        size_bytes_max=settings.file_size_bytes_max,
        chunk_bytes_max=settings.chunk_bytes_max,
        idle_s_max=settings.upload_idle_s_max,
        idle_bytes_min=settings.upload_idle_bytes_min,
        dataset=DatasetLimits(
            line_bytes_max=settings.dataset_line_bytes_max,
            lines_max=settings.dataset_lines_max,
            messages_max=settings.dataset_messages_max,
            errors_max=settings.dataset_errors_max,
            cells_max=settings.dataset_cells_max,
            expanded_bytes_max=settings.dataset_expanded_bytes_max,
        ),
        process=ProcessLimits(
            inline_bytes_max=settings.check_inline_bytes_max,
            check_s_max=settings.check_s_max,
            memory_bytes_max=settings.check_memory_bytes_max,
            spool_dir=settings.parquet_spool_dir,
        ),
    )


class RemovedMeanwhile(Aborted):
    """A sweep took the bytes of an upload that lasted longer than any may."""


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A checked header."""

    project_id: str
    uploader: Uploader
    display_name: str
    announced: Announced
    request: Request


class Uploads:
    """Takes uploads in, as many at a time as there are slots."""

    def __init__(
        self,
        pool: Pool,
        artifacts: ObjectStore,
        collector: ArtifactCollector,
        clock: Clock,
        ids: Ids,
        settings: GatewaySettings,
    ) -> None:
        self._pool = pool
        self._artifacts = artifacts
        self._collector = collector
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._slots = UploadSlots(
            uploads_max=settings.uploads_max,
            per_organization_max=settings.uploads_per_organization_max,
            per_key_max=settings.uploads_per_key_max,
        )
        self._check_places = CheckPlaces(settings.checks_concurrent_max)
        # Of their own: what waits for a slow check keeps nothing else of this process waiting.
        self._threads = ThreadPoolExecutor(settings.uploads_max, thread_name_prefix="upload")

    async def take(self, new: NewFile, chunks: AsyncIterator[bytes]) -> str:
        """Id of the stored file; that of the earlier one when the same request was here before."""
        async with self._pool.acquire() as connection:
            file_id = await idempotency.earlier(connection, new.request)
        if file_id is not None:
            return file_id
        with self._slots.take(new.uploader):
            return await self._store_new(new, chunks)

    async def _store_new(self, new: NewFile, chunks: AsyncIterator[bytes]) -> str:
        file_id = self._ids.new("file")
        key = artifact_key(new.project_id, file_id)
        reservation = Reservation(self._pool, new.project_id, key, self._settings)
        try:
            await reservation.begin(new.announced.size_bytes)
            received = await self._receive(new, chunks, key, reservation)
            kept_id = await self._keep(new, received, file_id, key)
        except ReservationOver as error:
            await self._discard(key, is_forgotten=True)
            raise _removed_meanwhile() from error
        except RemovedMeanwhile:
            # The removal ended before the last byte came: nobody else will look for what was stored after it.
            await self._discard(key, is_forgotten=True)
            raise
        except BaseException:
            await self._discard(key)
            raise
        if kept_id != file_id:
            await self._discard(key)
        return kept_id

    async def _receive(
        self, new: NewFile, chunks: AsyncIterator[bytes], key: str, reservation: Reservation
    ) -> Received:
        settings = self._settings
        try:
            async with asyncio.timeout(settings.upload_s_max):
                stream = UploadStream(new.announced, upload_limits(settings), self._workshop(new, reservation))
                return await stream.receive(chunks, self._artifacts, key)
        except TimeoutError as error:
            message = f"the upload took longer than upload_s_max, {settings.upload_s_max:g} seconds; nothing was kept"
            raise DeadlineExceeded("DEADLINE_TOO_SHORT", message, metadata={"limit": "upload_s_max"}) from error

    def _workshop(self, new: NewFile, reservation: Reservation) -> Workshop:
        return Workshop(
            threads=self._threads,
            check_place=lambda: self._check_places.take(new.uploader.organization_id),
            grow=reservation.grow,
        )

    async def _keep(self, new: NewFile, received: Received, file_id: str, key: str) -> str:
        report, now = received.report, self._clock.now()
        file = StoredFile(
            file_id=file_id,
            project_id=new.project_id,
            display_name=new.display_name,
            purpose="fine-tune",
            state="invalid" if report.error_count else "ready",
            size_bytes=received.size_bytes,
            sha256=received.sha256,
            format=report.format,
            line_count=report.line_count,
            error_count=report.error_count,
            errors=report.errors,
            features=report.features.used(),
            create_time=now,
            work_bytes=report.work.in_bytes,
        )
        async with transaction(self._pool) as connection:
            if not await idempotency.claim(connection, new.request, file_id, now):
                first_id = await idempotency.earlier(connection, new.request)
                assert first_id is not None
                return first_id
            if not await FileStore(connection).take_back_removal(key):
                raise _removed_meanwhile()
            await FileStore(connection).add(file)
        return file_id

    async def _discard(self, key: str, *, is_forgotten: bool = False) -> None:
        try:
            # Shielded: also a cancelled upload cleans up after itself.
            await asyncio.shield(self._collector.discard(key, is_forgotten=is_forgotten))
        except Exception as error:
            if not is_passing(error):
                raise
            log.warning("artifact_left_to_gc", artifact_key=key, error=repr(error))


def _removed_meanwhile() -> RemovedMeanwhile:
    return RemovedMeanwhile("STATE_CONFLICT", "the upload took too long and its bytes were removed; send it again")
