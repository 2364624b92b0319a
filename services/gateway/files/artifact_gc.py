"""Artifact garbage collection: removes bytes that no file needs any more. Not pure: database, artifact store.

It serves nobody.
"""

from chassis.backoff import Backoff
from chassis.clock import Clock
from chassis.db.pool import Pool, database_is_away, transaction
from chassis.errors import is_away
from chassis.objects.object_store import ObjectStore
from chassis.rounds import BACKOFF_S_FIRST, Signal, run_rounds
from services.gateway.config import GatewaySettings
from services.gateway.files.file_uses import FileUses
from services.gateway.files.store import FileStore


class ArtifactCollector:
    """A removal is claimed in one short transaction, done outside of any, and forgotten in another.

    A process that dies in between leaves a claim that is taken over later.
    """

    def __init__(
        self, pool: Pool, artifacts: ObjectStore, uses: FileUses, clock: Clock, settings: GatewaySettings
    ) -> None:
        self._pool = pool
        self._artifacts = artifacts
        self._uses = uses
        self._clock = clock
        self._settings = settings
        self._due = Signal()

    async def run(self) -> None:
        pause_s = self._settings.sweep_interval_s
        await run_rounds(
            "artifact_gc",
            self._round,
            wait=lambda: self._due.wait(pause_s),
            clock=self._clock,
            backoff=Backoff(first_s=min(BACKOFF_S_FIRST, pause_s), last_s=pause_s),
            is_passing=is_passing,
        )

    def wake(self) -> None:
        """Something is due now."""
        self._due.send()

    async def _round(self) -> bool:
        return await self.collect() >= self._settings.sweep_batch_max

    async def collect(self) -> int:
        """Does what is due, one batch at most; returns how many objects that were.

        A deleted file that a job still reads is looked at again later.
        """
        async with transaction(self._pool) as connection:
            due = await FileStore(connection).claim_removals(
                claim_s=self._settings.sweep_claim_s, limit=self._settings.sweep_batch_max
            )
        for removal in due:
            if not removal.was_file:
                await self._remove(removal.artifact_key)
        files = [removal.artifact_key for removal in due if removal.was_file]
        used = await self._uses.used(files)
        for key in files:
            if key not in used:
                await self._remove(key)
        if used:
            async with self._pool.acquire() as connection:
                await FileStore(connection).postpone_removals(used, self._settings.deleted_file_recheck_s)
        return len(due)

    async def discard(self, key: str, *, is_forgotten: bool = False) -> None:
        """Removes bytes at once that were never given to a file; does nothing when a file has them after all.

        `is_forgotten`: the caller knows that no file has them, although no removal is noted any more.
        """
        async with self._pool.acquire() as connection:
            claimed = await FileStore(connection).claim_removal(key)
        if claimed or is_forgotten:
            await self._remove(key)

    async def _remove(self, key: str) -> None:
        await self._artifacts.remove(key)
        async with self._pool.acquire() as connection:
            await FileStore(connection).finish_removal(key)


def is_passing(error: Exception) -> bool:
    """Whether database or artifact store are away and the same work may succeed later."""
    return is_away(error) or database_is_away(error)
