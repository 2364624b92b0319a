"""How a background worker lives: round after round, with a pause when there is nothing to do.

It knows nothing of what a round does. Also here: the signal that ends a pause early, and what keeps a worker from
judging others by the time of its own absence, or by a clock that was set.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime

import structlog

from chassis.backoff import Backoff
from chassis.clock import Clock
from chassis.db.pool import database_is_away

BACKOFF_S_FIRST = 0.05
BACKOFF_S_LAST = 1.0
log = structlog.get_logger(__name__)


async def run_rounds(
    worker: str,
    work: Callable[[], Awaitable[object]],
    *,
    wait: Callable[[], Awaitable[None]],
    clock: Clock,
    backoff: Backoff | None = None,
    is_passing: Callable[[Exception], bool] = database_is_away,
) -> None:
    """Does rounds until cancelled. A true answer of `work` means that there may be more to do at once; otherwise `wait`
    says when to look again.

    After a failure that `is_passing`, the next round comes after the backoff's pause. Any other failure is a defect and
    is raised.
    """
    pauses = backoff or Backoff(first_s=BACKOFF_S_FIRST, last_s=BACKOFF_S_LAST)
    while True:
        try:
            more = await work()
        except Exception as error:
            if not is_passing(error):
                raise
            log.warning("round_postponed", worker=worker, error=repr(error))
            await clock.sleep(pauses.next_s())
            continue
        pauses.reset()
        if not more:
            await wait()


def outlived(worker: str, run: Callable[[], Awaitable[None]], *, clock: Clock) -> Callable[[], Awaitable[None]]:
    """`run` for a process that must outlive this worker, because what it serves needs none of it to go on.

    Whatever ends the worker is logged as an error, and it runs again after a pause. When it returns, it is done.
    """

    async def run_again() -> None:
        pauses = Backoff(first_s=BACKOFF_S_FIRST, last_s=BACKOFF_S_LAST)
        while True:
            try:
                return await run()
            except Exception as error:
                log.error("worker_failed", worker=worker, exc_info=error)
                await clock.sleep(pauses.next_s())

    return run_again


class Signal:
    """Wakes one waiter. It carries no data; what is sent while nobody waits is kept for the next wait, once."""

    def __init__(self) -> None:
        self._sent = asyncio.Event()

    def send(self) -> None:
        self._sent.set()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Returns at the next `send`, at once if one came since the last wait, or after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._sent.wait()
        except TimeoutError:
            return
        finally:
            self._sent.clear()


class AbsenceGuard:
    """Says whether a worker may judge the silence of others: only after it has listened long enough without a gap.

    A worker that was down, or cut off from its database, heard nobody meanwhile: leases and holds look expired although
    their owners are well. Time is monotonic, so a clock that is set does not look like an absence.
    """

    def __init__(self, clock: Clock, *, gap_s_max: float, watch_s_min: float) -> None:
        """`gap_s_max` between two looks is still a watch; `watch_s_min` of it entitles to a judgement."""
        self._clock = clock
        self._gap_s_max = gap_s_max
        self._watch_s_min = watch_s_min
        self._since_s = self._last_s = clock.monotonic()

    def look(self) -> None:
        """Called in each round that reached the database; a gap that is too long begins the watch anew."""
        now_s = self._clock.monotonic()
        if now_s - self._last_s > self._gap_s_max:
            self._since_s = now_s
        self._last_s = now_s

    def begin_anew(self) -> None:
        """The watch so far counts for nothing, for instance because the clock of the leases was set."""
        self._since_s = self._last_s

    @property
    def may_judge(self) -> bool:
        return self._last_s - self._since_s >= self._watch_s_min


class ClockWatch:
    """Says when a clock was set: from one look to the next it then went on by another time than the monotonic clock."""

    def __init__(self, jump_s_max: float) -> None:
        self._jump_s_max = jump_s_max
        self._offset_s: float | None = None

    def has_jumped(self, time: datetime, monotonic_s: float) -> bool:
        """Whether the clock that shows `time` was set since the last look."""
        before_s, self._offset_s = self._offset_s, time.timestamp() - monotonic_s
        return before_s is not None and abs(self._offset_s - before_s) > self._jump_s_max
