"""Not pure: database, protobuf. A watch of one job: what stands now, then every change as it is committed.

It ends when the job has ended.
"""

from collections.abc import AsyncIterator

from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2
from services.scheduler.api.convert import job_event_to_proto
from services.scheduler.api.job_view import JobView
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.convert import unknown_job
from services.scheduler.jobs.job import JobRef
from services.scheduler.jobs.lifecycle import FINAL
from services.scheduler.jobs.store import JobStore
from services.scheduler.watching.hub import Hub, job_topic


class Follower:
    def __init__(self, database: Database, view: JobView, hub: Hub, settings: SchedulerSettings) -> None:
        self._database = database
        self._view = view
        self._hub = hub
        self._settings = settings

    async def follow(
        self, ref: JobRef, after_sequence: int
    ) -> AsyncIterator[tuning_service_pb2.WatchTuningJobResponse]:
        """Every event after `after_sequence` once and in order; a reader that was cut off goes on from its last one."""
        jobs, batch_max = JobStore(self._database.pool), self._settings.watch_batch_max
        sequence = after_sequence
        last: tuning_job_pb2.TuningJob | None = None
        with self._hub.listening(job_topic(ref.job_id)) as signal:
            while True:
                # The job first: a final one has all its events, so the events read after it are complete.
                job = await jobs.get(ref)
                if job is None:
                    raise unknown_job(ref)
                events = await jobs.list_events(ref, sequence, batch_max)
                shown = await self._view.show(job)
                if events or shown != last:
                    yield tuning_service_pb2.WatchTuningJobResponse(
                        tuning_job=shown, events=[job_event_to_proto(event) for event in events]
                    )
                    last = shown
                if events:
                    sequence = events[-1].sequence
                if len(events) == batch_max:
                    continue
                if job.state in FINAL:
                    return
                await signal.wait(self._settings.watch_poll_s)
