"""Carries the usage of calls to the outbox, many records in one transaction. Not pure: database.

A call ends for its caller only when its record is committed: what was served is metered, also after a crash.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from chassis.bus.outbox import Outbox
from chassis.db.pool import Pool, transaction
from services.inference.metering import convert
from services.inference.metering.domain import UsageOfCall


class Meter:
    """Collects records for a moment and commits them together (group commit)."""

    def __init__(self, pool: Pool, outbox: Outbox, *, batch_s: float, batch_max: int) -> None:
        self._pool = pool
        self._outbox = outbox
        self._batch_s = batch_s
        self._batch_max = batch_max
        self._waiting: list[tuple[UsageOfCall, asyncio.Future[None]]] = []
        self._woken = asyncio.Event()

    async def record(self, usage: UsageOfCall) -> None:
        """Returns when the record is committed; raises what the commit raised."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((usage, done))
        self._woken.set()
        # Shielded: a caller that hangs up does not take its record back.
        await asyncio.shield(done)

    async def run(self) -> None:
        """Commits batches until cancelled, and what is left then."""
        try:
            while True:
                await self._woken.wait()
                await asyncio.sleep(self._batch_s)
                self._woken.clear()
                await self.flush()
        finally:
            await self.flush()

    async def flush(self) -> None:
        """Commits everything that waits now."""
        while self._waiting:
            batch, self._waiting = self._waiting[: self._batch_max], self._waiting[self._batch_max :]
            try:
                await self._commit([usage for usage, _ in batch])
            except Exception as error:
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
                        # The caller may be gone; its exception then has nobody to hear it.
                        done.exception()
            else:
                for _, done in batch:
                    if not done.done():
                        done.set_result(None)

    async def _commit(self, usages: Sequence[UsageOfCall]) -> None:
        async with transaction(self._pool) as connection:
            await self._outbox.add(
                connection,
                convert.usages_to_proto(usages),
                subject_name=f"projects/{usages[0].project_id}",
                key=usages[0].generation_id,
            )
        self._outbox.wake()
