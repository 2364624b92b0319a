"""Not pure: database, protobuf. A job as it is shown: its row, and why it waits while it does. It changes nothing."""

from collections.abc import Sequence

from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.api.convert import job_to_proto
from services.scheduler.api.queue_snapshot import QueueSnapshots
from services.scheduler.database import Database
from services.scheduler.jobs.job import Job, JobRef, Queue
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.jobs.store import JobStore


class JobView:
    def __init__(self, database: Database, snapshots: QueueSnapshots) -> None:
        self._database = database
        self._snapshots = snapshots

    async def one(self, ref: JobRef) -> tuning_job_pb2.TuningJob | None:
        job = await JobStore(self._database.pool).get(ref)
        return None if job is None else (await self.many([job]))[0]

    async def many(self, jobs: Sequence[Job]) -> list[tuning_job_pb2.TuningJob]:
        failed_nodes = await self.failed_nodes(jobs)
        return [await self.show(job, failed_nodes.get(job.job_id, frozenset())) for job in jobs]

    async def show(self, job: Job, failed_nodes: frozenset[str]) -> tuning_job_pb2.TuningJob:
        """`failed_nodes` of a queued job, as `failed_nodes()` finds them."""
        if job.state is JobState.QUEUED:
            return job_to_proto(job, (await self._snapshots.latest()).queue_of(job, failed_nodes))
        return job_to_proto(job, _before_queue(job))

    async def failed_nodes(self, jobs: Sequence[Job]) -> dict[str, frozenset[str]]:
        """The nodes that queued jobs avoid, by job; a job without an attempt avoids none."""
        tried = [job.job_id for job in jobs if job.state is JobState.QUEUED and job.attempt_count]
        return await JobStore(self._database.pool).failed_nodes(tried) if tried else {}


def _before_queue(job: Job) -> Queue | None:
    """A job that is being validated tells which service it waits for, when it does."""
    if not job.waiting_message:
        return None
    return Queue(position=0, waiting_for=job.waiting_message, estimated_wait_s=None)
