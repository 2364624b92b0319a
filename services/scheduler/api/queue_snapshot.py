"""Not pure: database. The queue and the fleet as all readers see them: read once for all who ask within a while.

A read of its own for each reader would scan the whole queue each time. It decides nothing; the placer reads for itself.
"""

import asyncio
import contextvars
from bisect import bisect_left
from collections.abc import Sequence

from chassis.clock import Clock
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.job import Job, Queue
from services.scheduler.jobs.store import JobStore
from services.scheduler.placement import policy
from services.scheduler.placement.store import AllocationStore

_Ask = tuple[int, int, frozenset[str], bool]


class QueueSnapshot:
    """`queue_times` and `remaining_s` are sorted."""

    def __init__(
        self, queue_times: Sequence[float], groups: Sequence[policy.DeviceGroup], remaining_s: Sequence[float]
    ) -> None:
        self._queue_times = queue_times
        self._groups = groups
        self._remaining_s = remaining_s
        # Most jobs ask for the same, so that few sentences are made for many.
        self._waiting_for: dict[_Ask, str] = {}

    def queue_of(self, job: Job, failed_nodes: frozenset[str]) -> Queue:
        """Why a queued job waits. One that came after the snapshot stands at its end."""
        assert job.queue_time is not None
        position = bisect_left(self._queue_times, job.queue_time.timestamp()) + 1
        return Queue(
            position=position,
            waiting_for=self._words(job, failed_nodes, is_first=position == 1),
            estimated_wait_s=policy.estimated_wait_s(position, self._remaining_s),
        )

    def _words(self, job: Job, failed_nodes: frozenset[str], *, is_first: bool) -> str:
        ask = (job.gpu_count, job.memory_bytes_min, failed_nodes, is_first)
        words = self._waiting_for.get(ask)
        if words is None:
            need = policy.job_need(job.job_id, job.gpu_count, job.memory_bytes_min, failed_nodes)
            words = policy.waiting_for(need, self._groups, 1 if is_first else 2)
            self._waiting_for[ask] = words
        return words


class QueueSnapshots:
    """The snapshot of the moment, at most `queue_snapshot_s` old."""

    def __init__(self, database: Database, clock: Clock, settings: SchedulerSettings) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._latest: QueueSnapshot | None = None
        self._read_at_s = 0.0
        self._reading: asyncio.Task[QueueSnapshot] | None = None

    async def latest(self) -> QueueSnapshot:
        if self._latest is not None and self._clock.monotonic() - self._read_at_s <= self._settings.queue_snapshot_s:
            return self._latest
        if self._reading is None:
            # With a context of its own: it may outlive the call that asked first.
            self._reading = asyncio.create_task(self._read(), context=contextvars.Context())
            self._reading.add_done_callback(self._forget)
        return await asyncio.shield(self._reading)

    async def _read(self) -> QueueSnapshot:
        began_s, pool = self._clock.monotonic(), self._database.pool
        fleet = await AllocationStore(pool).load_fleet(self._settings.node_memory_s, self._settings.nodes_max)
        self._latest = QueueSnapshot(
            await JobStore(pool).queue_times(),
            fleet.groups,
            await JobStore(pool).list_remaining_s(),
        )
        self._read_at_s = began_s
        return self._latest

    def _forget(self, reading: asyncio.Task[QueueSnapshot]) -> None:
        self._reading = None
        if not reading.cancelled():
            # Whoever still waits hears of it; maybe nobody does.
            reading.exception()
