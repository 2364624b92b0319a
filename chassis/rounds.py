"""How a background worker lives: round after round, with a pause when there is nothing to do.

It knows nothing of what a round does. Also here: what keeps one bad item from stopping a worker, the signal that ends
a pause early, and what keeps a worker from judging others by the time of its own absence, or by a clock that was set.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import structlog

from chassis.backoff import Backoff
from chassis.clock import Clock
from chassis.db.pool import database_is_away
from chassis.process import CoroutineFunction, DrainStage, Process

BACKOFF_S_FIRST = 0.05
BACKOFF_S_LAST = 1.0
ITEM_PAUSE_S_FIRST = 1.0
ITEM_PAUSE_S_LAST = 300.0
# Of more items at once that fail, those are forgotten that failed longest ago: they are tried sooner.
ITEMS_FAILING_MAX = 10_000
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


def spawn_keeper(
    process: Process,
    clock: Clock,
    name: str,
    work: CoroutineFunction,
    *,
    until: DrainStage = DrainStage.STOP_CONSUMING,
) -> None:
    """A worker in the background whose defects end neither the process nor what it serves."""
    process.spawn(name, outlived(name, work, clock=clock), until=until)


@dataclass(kw_only=True)
class _Failing:
    pauses: Backoff
    until_s: float = 0.0
    count: int = 0


class FailingItems:
    """Items of a worker whose work failed by a defect: each is left alone for a growing pause, and all others go on.

    One bad row must not stop the loop that everybody else's rows wait for. It is tried again without end, since it may
    be our mistake that the next release mends, unless its worker gives it up after some `failures`; each failure is
    logged as an error.
    """

    def __init__(
        self,
        worker: str,
        clock: Clock,
        *,
        first_s: float = ITEM_PAUSE_S_FIRST,
        last_s: float = ITEM_PAUSE_S_LAST,
        is_passing: Callable[[Exception], bool] = database_is_away,
    ) -> None:
        self._worker = worker
        self._clock = clock
        self._pauses_s = first_s, last_s
        self._is_passing = is_passing
        self._failing: OrderedDict[str, _Failing] = OrderedDict()

    def leaves_alone(self, item: str) -> bool:
        """Whether the item's pause goes on."""
        failing = self._failing.get(item)
        return failing is not None and failing.until_s > self._clock.monotonic()

    def left_alone(self) -> list[str]:
        """All items whose pause goes on, for a query that passes over them."""
        now_s = self._clock.monotonic()
        return [item for item, failing in self._failing.items() if failing.until_s > now_s]

    def failures(self, item: str) -> int:
        """How often it failed in a row, as far as this process knows."""
        failing = self._failing.get(item)
        return 0 if failing is None else failing.count

    @contextmanager
    def trying(self, item: str) -> Iterator[None]:
        """Work on one item. A failure that is passing is raised, because it is nothing of the item's; any other ends
        here."""
        try:
            yield
        except Exception as error:
            if self._is_passing(error):
                raise
            first_s, last_s = self._pauses_s
            failing = self._failing.setdefault(item, _Failing(pauses=Backoff(first_s=first_s, last_s=last_s)))
            pause_s = failing.pauses.next_s()
            failing.until_s, failing.count = self._clock.monotonic() + pause_s, failing.count + 1
            self._failing.move_to_end(item)
            if len(self._failing) > ITEMS_FAILING_MAX:
                self._failing.popitem(last=False)
            log.error("item_failed", worker=self._worker, item=item, again_in_s=round(pause_s, 1), exc_info=error)
        else:
            self._failing.pop(item, None)


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
