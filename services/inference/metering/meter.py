"""Carries what calls use to the outbox, while they run and when they end. Not pure: database.

A call ends for its caller only when its use is committed. A part that could not be committed is kept and tried again
until it is, and new calls are refused while too many wait: nothing is served that nobody counts.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import structlog

from chassis.backoff import Backoff
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Pool, database_is_away, transaction
from chassis.errors import Unavailable
from chassis.rounds import BACKOFF_S_FIRST, BACKOFF_S_LAST, Signal, run_rounds
from services.inference.config import InferenceSettings
from services.inference.metering import convert
from services.inference.metering.domain import CallUse, MeteredCall, UsagePart

REFUSED_RETRY_S = 1.0
log = structlog.get_logger()


@dataclass(kw_only=True, eq=False)
class _Account:
    """A call that is metered: its parts that are not committed yet, and who waits for them."""

    use: CallUse
    parts_waiting: int = 0
    committed: asyncio.Event = field(default_factory=asyncio.Event)


class Meter:
    """Cuts what running calls used into parts every `metering_interval_s`, and commits many parts together."""

    def __init__(self, pool: Pool, outbox: Outbox, *, settings: InferenceSettings, clock: Clock) -> None:
        self._pool = pool
        self._outbox = outbox
        self._batch_s = settings.usage_batch_s
        self._batch_max = self._batch_size = settings.usage_batch_max
        self._interval_s = settings.metering_interval_s
        self._waiting_max = settings.usage_waiting_max
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._waiting: deque[tuple[UsagePart, _Account]] = deque()
        self._added = Signal()
        self._look_at = clock.monotonic() + self._interval_s

    @contextmanager
    def metered(self, call: MeteredCall) -> Iterator[CallUse]:
        """Meters what the block counts, however it ends. Unavailable when too much waits for the database already."""
        if len(self._waiting) >= self._waiting_max:
            raise Unavailable(
                "DEPENDENCY_UNAVAILABLE",
                f"the use of {len(self._waiting)} calls could not be recorded yet (usage_waiting_max); try again",
                retry_after_s=REFUSED_RETRY_S,
            )
        account = self._accounts[call.generation_id] = _Account(use=CallUse(call))
        try:
            yield account.use
        finally:
            del self._accounts[call.generation_id]
            self._cut(account)

    async def commit(self, use: CallUse) -> None:
        """Returns once everything that the running call used is committed, however long the database is away."""
        account = self._accounts[use.call.generation_id]
        self._cut(account)
        if account.parts_waiting:
            await account.committed.wait()

    async def run(self) -> None:
        """Commits batches until cancelled, and then what is left."""
        try:
            await run_rounds("meter", self.round, wait=self._pause, clock=self._clock)
        except asyncio.CancelledError:
            await self._finish()
            raise

    async def round(self) -> bool:
        """Cuts what is due and commits one batch; True when more waits."""
        if self._clock.monotonic() >= self._look_at:
            self._look_at = self._clock.monotonic() + self._interval_s
            for account in self._accounts.values():
                # At most one early part of a call waits, so that a database that is away fills no memory.
                if not account.parts_waiting:
                    self._cut(account)
        if self._waiting:
            await self._commit_batch()
        return bool(self._waiting)

    async def _pause(self) -> None:
        await self._added.wait(max(0.0, self._look_at - self._clock.monotonic()))
        await self._clock.sleep(self._batch_s)

    def _cut(self, account: _Account) -> None:
        part = account.use.cut(self._clock.now())
        if part is not None:
            account.parts_waiting += 1
            account.committed.clear()
            self._waiting.append((part, account))
            self._added.send()

    async def _commit_batch(self) -> None:
        batch = list(islice(self._waiting, self._batch_size))
        try:
            await self._commit([part for part, _ in batch])
        except Exception as error:
            if database_is_away(error):
                # It may have been stored without a word: exactly this batch again is the same event.
                self._batch_size = len(batch)
            else:
                # One part that cannot be stored must not keep the others: it ends up alone, and then behind them.
                self._batch_size = max(1, len(batch) // 2)
                if len(batch) == 1:
                    self._waiting.rotate(-1)
            raise
        self._batch_size = min(self._batch_max, self._batch_size * 2)
        for _, account in batch:
            self._waiting.popleft()
            account.parts_waiting -= 1
            if not account.parts_waiting:
                account.committed.set()

    async def _commit(self, parts: Sequence[UsagePart]) -> None:
        # All parts name the event, so that the same batch is the same event and no other batch is.
        key = hashlib.sha256("\n".join(part.work_key for part in parts).encode()).hexdigest()
        async with transaction(self._pool) as connection:
            await self._outbox.add(
                connection,
                convert.parts_to_proto(parts),
                subject_name=f"projects/{parts[0].call.project_id}",
                key=key,
            )
        self._outbox.wake()

    async def _finish(self) -> None:
        """Commits what is left, also of calls that were cut off, until it is done or cancelled again."""
        for account in self._accounts.values():
            self._cut(account)
        pauses = Backoff(first_s=BACKOFF_S_FIRST, last_s=BACKOFF_S_LAST)
        try:
            while self._waiting:
                try:
                    await self._commit_batch()
                except Exception as error:
                    log.warning("usage_waits", parts=len(self._waiting), error=repr(error))
                    await self._clock.sleep(pauses.next_s())
        finally:
            if self._waiting:
                log.error("usage_lost", parts=len(self._waiting))
