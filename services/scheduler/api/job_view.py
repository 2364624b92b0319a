"""Not pure: database, protobuf. A job as it is shown: its row, and why it waits while it does. It changes nothing."""

from collections.abc import Sequence

from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.api.convert import job_to_proto
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.job import Job, JobRef, Queue
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.jobs.store import JobStore
from services.scheduler.placement import policy
from services.scheduler.placement.store import AllocationStore

RUNNING_JOBS_SEEN_MAX = 1000


class JobView:
    def __init__(self, database: Database, settings: SchedulerSettings) -> None:
        self._database = database
        self._settings = settings

    async def one(self, ref: JobRef) -> tuning_job_pb2.TuningJob | None:
        job = await JobStore(self._database.pool).get(ref)
        return None if job is None else await self.show(job)

    async def show(self, job: Job) -> tuning_job_pb2.TuningJob:
        if job.state is JobState.QUEUED:
            return job_to_proto(job, (await self._queues([job])).get(job.job_id))
        return job_to_proto(job, _before_queue(job))

    async def many(self, jobs: Sequence[Job]) -> list[tuning_job_pb2.TuningJob]:
        queued = [job for job in jobs if job.state is JobState.QUEUED]
        queues = await self._queues(queued) if queued else {}
        return [job_to_proto(job, queues.get(job.job_id) or _before_queue(job)) for job in jobs]

    async def _queues(self, jobs: Sequence[Job]) -> dict[str, Queue]:
        now = self._database.now()
        pool = self._database.pool
        positions = await JobStore(pool).queue_positions([job.job_id for job in jobs])
        fleet = await AllocationStore(pool).load_fleet(self._settings.node_memory_s, self._settings.nodes_max)
        remaining_s = await JobStore(pool).list_remaining_s(now, RUNNING_JOBS_SEEN_MAX)
        failed_nodes = await JobStore(pool).failed_nodes([job.job_id for job in jobs])
        queues = {}
        for job in jobs:
            # A job that was placed between the two reads waits for nothing any more.
            position = positions.get(job.job_id, 0)
            need = policy.job_need(job.job_id, job.gpu_count, job.memory_bytes_min, failed_nodes[job.job_id])
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
