"""Makes a file out of an upload: bytes into the store, then one transaction that gives them a row, or no trace at all."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import structlog

from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import Aborted, DeadlineExceeded, ResourceExhausted
from chassis.ids import Ids
from chassis.objects.client import ObjectStore
from services.gateway import idempotency
from services.gateway.config import GatewaySettings
from services.gateway.domain import StoredFile, artifact_key
from services.gateway.idempotency import Request
from services.gateway.store import Store
from services.gateway.sweep import Sweeper, is_passing
from services.gateway.upload import Announced, Received, Upload, UploadLimits

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A checked header."""

    project_id: str
    display_name: str
    announced: Announced
    request: Request


class Intake:
    """Takes uploads in, at most `uploads_max` at a time."""

    def __init__(
        self,
        pool: Pool,
        store: Store,
        artifacts: ObjectStore,
        sweeper: Sweeper,
        clock: Clock,
        ids: Ids,
        settings: GatewaySettings,
    ) -> None:
        self._pool = pool
        self._store = store
        self._artifacts = artifacts
        self._sweeper = sweeper
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._in_flight = 0

    async def take(self, wanted: Wanted, chunks: AsyncIterator[bytes]) -> str:
        """Id of the stored file; that of the earlier one when the same request was here before."""
        async with self._pool.acquire() as connection:
            file_id = await idempotency.earlier(self._store, connection, wanted.request)
        if file_id is not None:
            return file_id
        with self._slot():
            return await self._store_new(wanted, chunks)

    async def _store_new(self, wanted: Wanted, chunks: AsyncIterator[bytes]) -> str:
        file_id = self._ids.new("file")
        key = artifact_key(wanted.project_id, file_id)
        # Noted before the first byte: whatever happens to this process, a sweep finds what it left.
        due = self._clock.now() + timedelta(seconds=self._settings.upload_s_max + self._settings.sweep_claim_s)
        try:
            async with self._pool.acquire() as connection:
                await self._store.add_removal(connection, key, due)
            received = await self._receive(wanted, chunks, key)
            kept_id = await self._keep(wanted, received, file_id, key)
        except BaseException:
            await self._discard(key)
            raise
        if kept_id != file_id:
            await self._discard(key)
        return kept_id

    async def _receive(self, wanted: Wanted, chunks: AsyncIterator[bytes], key: str) -> Received:
        settings = self._settings
        limits = UploadLimits(
            size_bytes_max=settings.file_size_bytes_max,
            chunk_bytes_max=settings.chunk_bytes_max,
            idle_s_max=settings.upload_idle_s_max,
            dataset=settings.dataset_limits,
            parquet=settings.parquet_limits,
        )
        try:
            async with asyncio.timeout(settings.upload_s_max):
                return await Upload(wanted.announced, limits).receive(chunks, self._artifacts, key)
        except TimeoutError as error:
            message = f"the upload took longer than upload_s_max, {settings.upload_s_max:g} seconds; nothing was kept"
            raise DeadlineExceeded("DEADLINE_TOO_SHORT", message, metadata={"limit": "upload_s_max"}) from error

    async def _keep(self, wanted: Wanted, received: Received, file_id: str, key: str) -> str:
        report, now = received.report, self._clock.now()
        file = StoredFile(
            file_id=file_id,
            project_id=wanted.project_id,
            display_name=wanted.display_name,
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
        )
        async with transaction(self._pool) as connection:
            if not await idempotency.claim(self._store, connection, wanted.request, file_id, now):
                first_id = await idempotency.earlier(self._store, connection, wanted.request)
                assert first_id is not None
                return first_id
            if not await self._store.take_back_removal(connection, key):
                raise Aborted("STATE_CONFLICT", "the upload took too long and its bytes were removed; send it again")
            await self._store.add_file(connection, file)
        return file_id

    async def _discard(self, key: str) -> None:
        try:
            # Shielded: also a cancelled upload cleans up after itself.
            await asyncio.shield(self._sweeper.discard(key))
        except Exception as error:
            if not is_passing(error):
                raise
            log.warning("left to the sweep", artifact_key=key, error=repr(error))

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self._in_flight >= self._settings.uploads_max:
            raise ResourceExhausted(
                "CAPACITY_EXHAUSTED",
                f"{self._in_flight} uploads are in flight, as many as uploads_max allows; try again in a moment",
                metadata={"limit": "uploads_max"},
                retry_after_s=1.0,
            )
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
