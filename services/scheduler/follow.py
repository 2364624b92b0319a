"""A watch of one job: what stands now, then every change as it is committed, until the job has ended."""

from collections.abc import AsyncIterator

from chassis.errors import NotFound
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2
from services.scheduler import job_store
from services.scheduler.config import SchedulerSettings
from services.scheduler.convert import event_to
from services.scheduler.domain import JobRef
from services.scheduler.lifecycle import FINAL
from services.scheduler.store import Store, job_topic
from services.scheduler.view import JobView
from services.scheduler.watch import Hub


class Follower:
    def __init__(self, store: Store, view: JobView, hub: Hub, settings: SchedulerSettings) -> None:
        self._store = store
        self._view = view
        self._hub = hub
        self._settings = settings

    async def follow(
        self, ref: JobRef, after_sequence: int
    ) -> AsyncIterator[tuning_service_pb2.WatchTuningJobResponse]:
        """Every event after `after_sequence` once and in order; a reader that was cut off goes on from its last one."""
        batch_max = self._settings.watch_batch_max
        sequence = after_sequence
        last: tuning_job_pb2.TuningJob | None = None
        with self._hub.listening(job_topic(ref.job_id)) as bell:
            while True:
                # The job first: a final one has all its events, so the events read after it are complete.
                job = await job_store.get_job(self._store.pool, ref)
                if job is None:
                    raise NotFound("NOT_FOUND", f"there is no tuning job {job_store.resource_name(ref)}")
                events = await job_store.list_job_events(self._store.pool, ref, sequence, batch_max)
                shown = await self._view.show(job)
                if events or shown != last:
                    yield tuning_service_pb2.WatchTuningJobResponse(
                        tuning_job=shown, events=[event_to(event) for event in events]
                    )
                    last = shown
                if events:
                    sequence = events[-1].sequence
                if len(events) == batch_max:
                    continue
                if job.state in FINAL:
                    return
                await bell.wait(self._settings.watch_poll_s)
