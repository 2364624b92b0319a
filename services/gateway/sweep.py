"""Removes bytes that no file needs any more, and request_ids too old to come again. It serves nobody."""

import asyncio
from datetime import timedelta

import structlog

from chassis.clock import Clock
from chassis.db.pool import Pool, database_is_away, transaction
from chassis.errors import Unavailable
from chassis.objects.client import ObjectStore
from services.gateway.config import GatewaySettings
from services.gateway.store import Store

log = structlog.get_logger()


class Sweeper:
    """A removal is claimed in one short transaction, done outside of any, and forgotten in another; a process that
    dies in between leaves a claim that is taken over later."""

    def __init__(
        self, pool: Pool, store: Store, artifacts: ObjectStore, clock: Clock, settings: GatewaySettings
    ) -> None:
        self._pool = pool
        self._store = store
        self._artifacts = artifacts
        self._clock = clock
        self._settings = settings
        self._wake = asyncio.Event()

    async def run(self) -> None:
        while True:
            self._wake.clear()
            try:
                removed = await self.sweep()
            except Exception as error:
                if not is_passing(error):
                    raise
                log.warning("sweep postponed", error=repr(error))
                removed = 0
            if removed < self._settings.sweep_batch_max:
                await self._pause()

    def wake(self) -> None:
        """Something is due now."""
        self._wake.set()

    async def sweep(self) -> int:
        """Does what is due, one batch at most; returns how many objects went."""
        now = self._clock.now()
        async with transaction(self._pool) as connection:
            keys = await self._store.claim_removals(
                connection,
                now=now,
                claimed_before=now - timedelta(seconds=self._settings.sweep_claim_s),
                limit=self._settings.sweep_batch_max,
            )
            before = now - timedelta(seconds=self._settings.idempotency_retention_s)
            await self._store.prune_requests(connection, before, self._settings.sweep_batch_max)
        for key in keys:
            await self._artifacts.remove(key)
            async with self._pool.acquire() as connection:
                await self._store.finish_removal(connection, key)
        return len(keys)

    async def discard(self, key: str) -> None:
        """Removes bytes at once that were never given to a file; does nothing when a file has them after all."""
        async with self._pool.acquire() as connection:
            claimed = await self._store.claim_removal(connection, key, self._clock.now())
        if claimed:
            await self._artifacts.remove(key)
            async with self._pool.acquire() as connection:
                await self._store.finish_removal(connection, key)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._settings.sweep_interval_s):
                await self._wake.wait()
        except TimeoutError:
            return


def is_passing(error: Exception) -> bool:
    """Whether database or artifact store are away and the same work may succeed later."""
    return isinstance(error, Unavailable) or database_is_away(error)
