"""A job as it is shown: its row, and why it waits while it does. It changes nothing."""

from collections.abc import Sequence
from datetime import timedelta

from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler import job_store, policy
from services.scheduler.config import SchedulerSettings
from services.scheduler.convert import job_to
from services.scheduler.domain import Job, JobRef, Queue
from services.scheduler.lifecycle import JobState
from services.scheduler.node_store import load_fleet
from services.scheduler.store import Store

RUNNING_JOBS_SEEN_MAX = 1000


class JobView:
    def __init__(self, store: Store, settings: SchedulerSettings) -> None:
        self._store = store
        self._settings = settings

    async def one(self, ref: JobRef) -> tuning_job_pb2.TuningJob | None:
        job = await job_store.get_job(self._store.pool, ref)
        return None if job is None else await self.show(job)

    async def show(self, job: Job) -> tuning_job_pb2.TuningJob:
        if job.state is JobState.QUEUED:
            return job_to(job, (await self._queues([job])).get(job.job_id))
        return job_to(job, _before_queue(job))

    async def many(self, jobs: Sequence[Job]) -> list[tuning_job_pb2.TuningJob]:
        queued = [job for job in jobs if job.state is JobState.QUEUED]
        queues = await self._queues(queued) if queued else {}
        return [job_to(job, queues.get(job.job_id) or _before_queue(job)) for job in jobs]

    async def _queues(self, jobs: Sequence[Job]) -> dict[str, Queue]:
        now = self._store.now()
        pool = self._store.pool
        positions = await job_store.queue_positions(pool, [job.job_id for job in jobs])
        seen_since = now - timedelta(seconds=self._settings.node_memory_s)
        fleet = await load_fleet(pool, seen_since, self._settings.nodes_max)
        remaining_s = await job_store.list_remaining_s(pool, now, RUNNING_JOBS_SEEN_MAX)
        queues = {}
        for job in jobs:
            # A job that was placed between the two reads waits for nothing any more.
            position = positions.get(job.job_id, 0)
            need = policy.Need(
                owner=job.job_id,
                count=job.gpu_count,
                memory_bytes_min=job.memory_bytes_min,
                nodes_max=policy.GANG_NODES_MAX,
            )
            queues[job.job_id] = Queue(
                position=position,
                waiting_for=policy.waiting_for(need, fleet.groups, position) if position else "",
                estimated_wait_s=policy.estimated_wait_s(position, remaining_s),
            )
        return queues


def _before_queue(job: Job) -> Queue | None:
    """A job that is being validated tells which service it waits for, when it does."""
    if not job.waiting_message:
        return None
    return Queue(position=0, waiting_for=job.waiting_message, estimated_wait_s=None)
