"""Deletes what the archive need not keep, files past their age and what dead writers left. Not pure: database, objects.

It never deletes a row of the chain.
"""

import structlog

from chassis.clock import Clock
from chassis.db.pool import Pool, database_is_away, transaction
from chassis.errors import is_away
from chassis.objects.object_store import ObjectStore
from chassis.rounds import run_rounds
from services.billing.archive.store import ArchiveStore
from services.billing.config import BillingSettings

_log = structlog.get_logger(__name__)


class ArchiveKeeper:
    """Any number may run: each step may be repeated."""

    def __init__(self, pool: Pool, objects: ObjectStore, settings: BillingSettings, *, clock: Clock) -> None:
        self._pool = pool
        self._objects = objects
        self._settings = settings
        self._clock = clock

    async def run(self) -> None:
        await run_rounds(
            "archive_keeper",
            self.keep,
            wait=lambda: self._clock.sleep(self._settings.archive_keep_interval_s),
            clock=self._clock,
            is_passing=lambda error: database_is_away(error) or is_away(error),
        )

    async def keep(self) -> bool:
        """One round; True when there may be more."""
        settings, batch_max = self._settings, self._settings.archive_keep_batch_max
        async with transaction(self._pool) as connection:
            store = ArchiveStore(connection)
            left = await store.abandon_writes(older_s=settings.archive_write_s_max, row_max=batch_max)
            expired: list[tuple[int, str]] = []
            if settings.archive_retention_s > 0:
                expired = await store.list_expired(retention_s=settings.archive_retention_s, row_max=batch_max)
        for key in left:
            await self._objects.remove(key)
            async with transaction(self._pool) as connection:
                await ArchiveStore(connection).end_write(key)
            _log.info("archive_write_undone", object_key=key)
        for position, key in expired:
            async with transaction(self._pool) as connection:
                await ArchiveStore(connection).mark_removed(position, key)
            await self._objects.remove(key)
            async with transaction(self._pool) as connection:
                await ArchiveStore(connection).end_write(key)
            _log.info("archive_file_expired", position=position, object_key=key)
        return len(left) == batch_max or len(expired) == batch_max
