"""Time as a value that is passed in: the system's clock, and one that a test moves by hand.

It knows no time zone but UTC.
"""

import asyncio
import heapq
import itertools
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """`now` is aware UTC and may jump; `monotonic` is seconds from an arbitrary zero and never goes back."""

    def now(self) -> datetime: ...

    def monotonic(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The clock of the machine."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class ManualClock:
    """Stands still until a test advances it; sleepers wake in the order of their due times."""

    def __init__(self, start: datetime = datetime(2030, 1, 1, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed_s = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._sleep_began = asyncio.Event()

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed_s)

    def monotonic(self) -> float:
        return self._elapsed_s

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed_s + seconds, next(self._order), wake))
        self._sleep_began.set()
        await wake

    @property
    def sleepers(self) -> int:
        """How many tasks wait on this clock now."""
        return sum(not wake.done() for _, _, wake in self._sleepers)

    async def wait_for_sleepers(self, count: int = 1) -> None:
        """Returns once `count` tasks sleep on this clock, so that a test need not guess when to advance."""
        while self.sleepers < count:
            self._sleep_began.clear()
            await self._sleep_began.wait()

    async def advance(self, seconds: float) -> None:
        """Moves on, stopping at each due time on the way so that a woken task sees its own moment."""
        target_s = self._elapsed_s + seconds
        while self._sleepers and self._sleepers[0][0] <= target_s:
            due_s, _, wake = heapq.heappop(self._sleepers)
            self._elapsed_s = max(self._elapsed_s, due_s)
            if not wake.done():
                wake.set_result(None)
                await self._let_others_run()
        self._elapsed_s = target_s
        await self._let_others_run()

    def jump(self, seconds: float) -> None:
        """Moves on without waking anybody: what a process sees after the machine slept."""
        self._elapsed_s += seconds

    async def _let_others_run(self) -> None:
        # A woken task commonly needs a few turns of the loop before it sleeps again.
        for _ in range(5):
            await asyncio.sleep(0)
