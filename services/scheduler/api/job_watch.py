"""Not pure: database, protobuf. A watch of one job: what stands now, then every change as it is committed.

It ends when the job has ended.
"""

from collections.abc import AsyncIterator

from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2
from services.scheduler.api.convert import job_event_to_proto
from services.scheduler.api.job_feed import JobFeeds, JobReader, News
from services.scheduler.config import SchedulerSettings
from services.scheduler.jobs.job import JobEvent, JobRef
from services.scheduler.jobs.lifecycle import FINAL


class Follower:
    def __init__(self, feeds: JobFeeds, reader: JobReader, settings: SchedulerSettings) -> None:
        self._feeds = feeds
        self._reader = reader
        self._settings = settings

    async def follow(
        self, ref: JobRef, after_sequence: int
    ) -> AsyncIterator[tuning_service_pb2.WatchTuningJobResponse]:
        """Every event after `after_sequence` once and in order; a reader that was cut off goes on from its last one."""
        sequence = after_sequence
        last: tuning_job_pb2.TuningJob | None = None
        with self._feeds.joined(ref) as (feed, signal):
            while True:
                news = await feed.news()
                events, sequence = await self._events(news, sequence)
                if events or (news.shown is not last and news.shown != last):
                    yield tuning_service_pb2.WatchTuningJobResponse(
                        tuning_job=news.shown, events=[job_event_to_proto(event) for event in events]
                    )
                    last = news.shown
                if sequence < news.last_sequence:
                    continue
                if news.job.state in FINAL:
                    return
                await signal.wait()

    async def _events(self, news: News, sequence: int) -> tuple[list[JobEvent], int]:
        """The next lines, and the number up to which all lines are told then."""
        if sequence >= news.tail_after:
            events = [event for event in news.tail if event.sequence > sequence]
            return events, max(sequence, news.last_sequence)
        events = await self._reader.history(news.job, sequence)
        if len(events) == self._settings.watch_batch_max:
            return events, events[-1].sequence
        # Lines that were deleted by their age leave gaps, also at the end.
        return events, max([news.tail_after, *(event.sequence for event in events[-1:])])
