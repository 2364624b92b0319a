"""Not pure: database, protobuf. One reader of a job for all who watch it: they share what it read.

However many watch, a job is read once for a change, and one query for many jobs finds those that have changed unheard.
"""

import asyncio
import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from chassis.clock import Clock
from chassis.rounds import Signal, run_rounds
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.api.job_view import JobView
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.convert import unknown_job
from services.scheduler.jobs.job import Job, JobEvent, JobRef
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.jobs.store import JobStore
from services.scheduler.watching.hub import Hub, job_topic

# The newest lines of a job's history that a feed keeps for its watchers.
TAIL_EVENTS_MAX = 64
# Jobs that one look asks for, and watchers that are woken before others have their turn.
LOOK_BATCH_MAX = 500
WAKE_BATCH_MAX = 10


@dataclass(frozen=True, kw_only=True)
class News:
    """A job with the newest lines of its history: all those after `tail_after`."""

    job: Job
    shown: tuning_job_pb2.TuningJob
    failed_nodes: frozenset[str]
    tail_after: int
    tail: tuple[JobEvent, ...] = ()

    @property
    def last_sequence(self) -> int:
        return self.tail[-1].sequence if self.tail else self.tail_after


class JobFeed:
    """What the watchers of one job share. `signals` wake them when there may be news."""

    def __init__(self, ref: JobRef, reader: "JobReader") -> None:
        self.ref = ref
        self.signals: set[Signal] = set()
        self.latest: News | None = None
        # Of the row as it was when somebody last looked for changes.
        self.row_version: int | None = None
        self._reader = reader
        self._stale = True
        self._reading: asyncio.Task[None] | None = None

    def invalidate(self) -> None:
        """The job may have changed."""
        self._stale = True
        self.wake()

    def wake(self) -> None:
        for signal in self.signals:
            signal.send()

    async def news(self) -> News:
        """As of now: what is read already when nothing has changed since."""
        if self._stale and self._reading is not None:
            # It may have begun before the change.
            await asyncio.shield(self._reading)
        if self._stale and self._reading is None:
            self._stale = False
            # With a context of its own: it may outlive the watcher that began it.
            self._reading = asyncio.create_task(self._read(), context=contextvars.Context())
            self._reading.add_done_callback(self._end_reading)
        if self._reading is not None:
            await asyncio.shield(self._reading)
        assert self.latest is not None
        return self.latest

    async def _read(self) -> None:
        self.latest = await self._reader.read(self.ref, self.latest)
        self.row_version = self.latest.job.row_version

    def _end_reading(self, reading: asyncio.Task[None]) -> None:
        self._reading = None
        if reading.cancelled() or reading.exception() is not None:
            self._stale = True


class JobReader:
    """Reads for watchers, few at a time, so that they leave the pool to others."""

    def __init__(self, database: Database, view: JobView, settings: SchedulerSettings) -> None:
        self._database = database
        self._view = view
        self._settings = settings
        self._gate = asyncio.Semaphore(settings.watch_reads_concurrent_max)

    async def read(self, ref: JobRef, before: News | None) -> News:
        """NotFound for a job that is not there."""
        jobs, batch_max = JobStore(self._database.pool), self._settings.watch_batch_max
        async with self._gate:
            # The job first: a final one has all its events, so the events read after it are complete.
            job = await jobs.get(ref)
            if job is None:
                raise unknown_job(ref)
            failed_nodes = (await self._view.failed_nodes([job])).get(job.job_id, frozenset())
            shown = await self._view.show(job, failed_nodes)
            news = News(job=job, shown=shown, failed_nodes=failed_nodes, tail_after=job.last_sequence)
            if before is None:
                return news
            if job.last_sequence <= before.last_sequence:
                return replace(news, tail_after=before.tail_after, tail=before.tail)
            events = await jobs.list_events(ref, before.last_sequence, batch_max)
        if len(events) == batch_max:
            # Too many to keep: watchers read them by themselves.
            return news
        tail = (*before.tail, *events)
        if len(tail) <= TAIL_EVENTS_MAX:
            return replace(news, tail_after=before.tail_after, tail=tail)
        return replace(news, tail_after=tail[-TAIL_EVENTS_MAX - 1].sequence, tail=tail[-TAIL_EVENTS_MAX:])

    async def history(self, ref: JobRef, after_sequence: int) -> list[JobEvent]:
        """At most `watch_batch_max` lines, for a watcher that is behind the feed."""
        async with self._gate:
            return await JobStore(self._database.pool).list_events(ref, after_sequence, self._settings.watch_batch_max)

    async def row_versions(self, refs: list[JobRef]) -> dict[JobRef, int]:
        async with self._gate:
            return await JobStore(self._database.pool).row_versions([ref.job_id for ref in refs])

    async def show_again(self, news: News) -> News:
        """A queued job as the queue is now; its row is not read again."""
        shown = await self._view.show(news.job, news.failed_nodes)
        return news if shown == news.shown else replace(news, shown=shown)


class JobFeeds:
    """The feeds of all jobs that somebody watches here."""

    def __init__(self, reader: JobReader, hub: Hub, clock: Clock, settings: SchedulerSettings) -> None:
        self._reader = reader
        self._hub = hub
        self._clock = clock
        self._settings = settings
        self._feeds: dict[JobRef, JobFeed] = {}

    async def run(self) -> None:
        await run_rounds(
            "job_feeds", self.look_over, wait=lambda: self._clock.sleep(self._settings.watch_poll_s), clock=self._clock
        )

    @contextmanager
    def joined(self, ref: JobRef) -> Iterator[tuple[JobFeed, Signal]]:
        """The job's feed, and a signal that tells of news, as long as the watcher is there."""
        feed, signal = self._feeds.get(ref), Signal()
        if feed is None:
            feed = self._feeds[ref] = JobFeed(ref, self._reader)
            self._hub.call(job_topic(ref.job_id), feed.invalidate)
        feed.signals.add(signal)
        try:
            yield feed, signal
        finally:
            feed.signals.discard(signal)
            if not feed.signals:
                del self._feeds[ref]
                self._hub.call_no_more(job_topic(ref.job_id), feed.invalidate)

    async def look_over(self) -> bool:
        """One look for what changed without a word: rows by their versions, and the places of queued jobs."""
        feeds = list(self._feeds.values())
        for start in range(0, len(feeds), LOOK_BATCH_MAX):
            batch = feeds[start : start + LOOK_BATCH_MAX]
            versions = await self._reader.row_versions([feed.ref for feed in batch])
            for number, feed in enumerate(batch):
                await self._review(feed, versions.get(feed.ref))
                if number % WAKE_BATCH_MAX == 0:
                    # Heartbeats go on between.
                    await asyncio.sleep(0)
        return False

    async def _review(self, feed: JobFeed, row_version: int | None) -> None:
        news = feed.latest
        if news is None:
            return
        if row_version != feed.row_version:
            feed.row_version = row_version
            feed.invalidate()
        elif news.job.state is JobState.QUEUED:
            again = await self._reader.show_again(news)
            if again is not news and feed.latest is news:
                feed.latest = again
                feed.wake()
