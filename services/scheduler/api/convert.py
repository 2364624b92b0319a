"""Jobs, their events and checkpoints, and allocations as the messages of the public contracts.

Parts of a job that were stored encoded are merged as they are, which keeps GetTuningJob cheap.
"""

from chassis.timestamps import time_to_proto
from finemesh.allocations.v1 import allocation_service_pb2 as allocations
from finemesh.tuning.v1 import tuning_job_event_pb2, tuning_job_pb2
from services.scheduler.jobs.job import Job, JobEvent, Queue, StoredCheckpoint
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.placement.allocation import AllocationRecord

_JOB_STATES = {state: tuning_job_pb2.TuningJobState.Value(f"TUNING_JOB_STATE_{state.value}") for state in JobState}


def job_to_proto(job: Job, queue: Queue | None) -> tuning_job_pb2.TuningJob:
    message = tuning_job_pb2.TuningJob(
        # Written out, because this is the hottest read of the mesh.
        name=f"projects/{job.project_id}/tuningJobs/{job.job_id}",
        state=_JOB_STATES[job.state],
        quoted_nanos_usd=job.quoted_nanos_usd,
        price_book_version=job.price_book_version,
        hold_id=job.hold_id,
        output_model=job.output_model,
        output_revision=job.output_revision,
        attempt_count=job.attempt_count,
        create_time=time_to_proto(job.create_time),
        queue_time=time_to_proto(job.queue_time),
        start_time=time_to_proto(job.start_time),
        end_time=time_to_proto(job.end_time),
        update_time=time_to_proto(job.update_time),
        model_delete_time=time_to_proto(job.model_delete_time),
    )
    message.spec.MergeFromString(job.spec)
    if job.counts is not None:
        message.counts.MergeFromString(job.counts)
    if job.outlook is not None:
        message.outlook.MergeFromString(job.outlook)
    if job.progress is not None:
        message.progress.MergeFromString(job.progress)
    if job.error is not None:
        message.error.MergeFromString(job.error)
    if queue is not None:
        message.queue.position = queue.position
        message.queue.waiting_for = queue.waiting_for
        if queue.estimated_wait_s is not None:
            message.queue.estimated_wait_s = queue.estimated_wait_s
    return message


def job_event_to_proto(event: JobEvent) -> tuning_job_event_pb2.TuningJobEvent:
    message = tuning_job_event_pb2.TuningJobEvent(
        sequence=event.sequence,
        event_time=time_to_proto(event.event_time),
        kind=tuning_job_event_pb2.TuningJobEventKind.Value(f"TUNING_JOB_EVENT_KIND_{event.kind.value}"),
        message=event.message,
        state=_JOB_STATES[event.state],
    )
    if event.progress is not None:
        message.progress.MergeFromString(event.progress)
    return message


def checkpoint_to_proto(checkpoint: StoredCheckpoint) -> tuning_job_event_pb2.Checkpoint:
    return tuning_job_event_pb2.Checkpoint(
        step=checkpoint.step,
        attempt=checkpoint.attempt,
        manifest_sha256=checkpoint.manifest_sha256,
        size_bytes=checkpoint.size_bytes,
        create_time=time_to_proto(checkpoint.create_time),
        asked=checkpoint.asked,
    )


def allocation_to_proto(record: AllocationRecord, *, lease_duration_s: float) -> allocations.Allocation:
    message = allocations.Allocation(
        lease_token=record.lease_token,
        node=record.node,
        device_indices=record.device_indices,
        hardware_type=record.hardware_type,
        expire_time=time_to_proto(record.expires_at),
    )
    message.lease_duration.FromMilliseconds(int(lease_duration_s * 1000))
    return message
