"""Between the messages of the contracts and the scheduler's domain. It decides nothing and calls nobody.

Parts of a job that were stored encoded are merged as they are, which keeps GetTuningJob cheap.
"""

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from chassis.errors import FieldViolation, InvalidArgument
from chassis.names import format_name
from finemesh.allocations.v1 import allocation_service_pb2 as allocations
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from finemesh.tuning.v1 import tuning_job_event_pb2, tuning_job_pb2
from services.scheduler.domain import (
    AllocationRecord,
    AssignmentRecord,
    DeviceFacts,
    Job,
    JobEvent,
    JobFailure,
    NodeRegistration,
    Queue,
    StoredCheckpoint,
    Usage,
)
from services.scheduler.lifecycle import JobState
from services.scheduler.progress import Metric
from services.scheduler.spec import Violation

# Where the processes of a gang meet, on its leading node.
GANG_PORT_MIN = 29_400
GANG_PORT_COUNT = 600
_JOB_STATES = {state: tuning_job_pb2.TuningJobState.Value(f"TUNING_JOB_STATE_{state.value}") for state in JobState}


def job_name(project_id: str, job_id: str) -> str:
    return format_name(tuning_job_pb2.TuningJob, project=project_id, tuning_job=job_id)


def checkpoint_key_prefix(project_id: str, job_id: str) -> str:
    return f"jobs/{project_id}/{job_id}/checkpoints/"


def model_key_prefix(project_id: str) -> str:
    return f"models/{project_id}/"


def job_to(job: Job, queue: Queue | None) -> tuning_job_pb2.TuningJob:
    message = tuning_job_pb2.TuningJob(
        name=f"projects/{job.project_id}/tuningJobs/{job.job_id}",
        state=_JOB_STATES[job.state],
        quoted_nanos_usd=job.quoted_nanos_usd,
        price_book_version=job.price_book_version,
        hold_id=job.hold_id,
        output_model=job.output_model,
        output_revision=job.output_revision,
        attempt_count=job.attempt_count,
    )
    message.spec.MergeFromString(job.spec)
    if job.counts is not None:
        message.counts.MergeFromString(job.counts)
    if job.progress is not None:
        message.progress.MergeFromString(job.progress)
    if job.error is not None:
        message.error.MergeFromString(job.error)
    if queue is not None:
        message.queue.position = queue.position
        message.queue.waiting_for = queue.waiting_for
        if queue.estimated_wait_s is not None:
            message.queue.estimated_wait_s = queue.estimated_wait_s
    _set_time(message.create_time, job.create_time)
    _set_time(message.queue_time, job.queue_time)
    _set_time(message.start_time, job.start_time)
    _set_time(message.end_time, job.end_time)
    _set_time(message.update_time, job.update_time)
    return message


def event_to(event: JobEvent) -> tuning_job_event_pb2.TuningJobEvent:
    message = tuning_job_event_pb2.TuningJobEvent(
        sequence=event.sequence,
        kind=tuning_job_event_pb2.TuningJobEventKind.Value(f"TUNING_JOB_EVENT_KIND_{event.kind.value}"),
        message=event.message,
        state=_JOB_STATES[event.state],
    )
    if event.progress is not None:
        message.progress.MergeFromString(event.progress)
    _set_time(message.event_time, event.event_time)
    return message


def checkpoint_to(checkpoint: StoredCheckpoint) -> tuning_job_event_pb2.Checkpoint:
    message = tuning_job_event_pb2.Checkpoint(
        step=checkpoint.step,
        attempt=checkpoint.attempt,
        manifest_sha256=checkpoint.manifest_sha256,
        size_bytes=checkpoint.size_bytes,
        asked=checkpoint.asked,
    )
    _set_time(message.create_time, checkpoint.create_time)
    return message


def failure_to(failure: JobFailure) -> bytes:
    """The error as it is stored with the job."""
    message = tuning_job_pb2.JobError(
        reason=failure.reason,
        message=failure.message,
        platform_fault=failure.platform_fault,
        metadata=failure.metadata,
    )
    return message.SerializeToString(deterministic=True)


def failure_from(message: tuning_job_pb2.JobError) -> JobFailure:
    return JobFailure(
        reason=message.reason or "TRAINING_FAILED",
        message=message.message,
        platform_fault=message.platform_fault,
        metadata=dict(message.metadata),
    )


def metric_from(message: tuning_job_pb2.TuningProgress) -> Metric:
    validation_loss = None
    if message.HasField("validation_loss"):
        validation_loss = message.validation_loss
    elif message.HasField("initial_validation_loss"):
        validation_loss = message.initial_validation_loss
    return Metric(
        step=message.step,
        step_count=message.step_count,
        training_loss=message.training_loss,
        validation_loss=validation_loss,
        remaining_s=message.remaining_s if message.HasField("remaining_s") else None,
        encoded=message.SerializeToString(deterministic=True),
        rewards=(message.reward_accuracy, message.reward_margin) if message.HasField("reward_accuracy") else None,
    )


def usage_from(message: node_service_pb2.TrainingUsage, index: int) -> Usage:
    problem = ""
    if message.kind not in ("train", "evaluate"):
        problem = f"kind must be `train` or `evaluate`; got {message.kind[:40]!r}"
    elif message.tokens < 0 or message.start_step < 0 or message.end_step < message.start_step:
        problem = "tokens and steps must not be negative, and end_step not be before start_step"
    elif (message.kind == "train") != (message.end_step > message.start_step):
        problem = "a train range must hold a step, and an evaluation none"
    if problem:
        raise InvalidArgument(
            "INVALID_FIELD", f"usage[{index}]: {problem}", violations=[_at(f"usage[{index}]", problem)]
        )
    return Usage(kind=message.kind, start_step=message.start_step, end_step=message.end_step, tokens=message.tokens)


def registration_from(message: node_service_pb2.RegisterNodeRequest, devices_max: int) -> NodeRegistration:
    problems = [_at(field, "is missing") for field in ("node", "incarnation", "address") if not getattr(message, field)]
    if not 1 <= len(message.devices) <= devices_max:
        problems.append(_at("devices", f"must be 1 to {devices_max}; got {len(message.devices)}"))
    if len({device.index for device in message.devices}) != len(message.devices):
        problems.append(_at("devices", "must have different indices"))
    problems += [
        _at(f"devices[{at}]", "needs an index of 0 or more and a hardware_type")
        for at, device in enumerate(message.devices)
        if device.index < 0 or not device.hardware_type
    ]
    if problems:
        raise InvalidArgument("INVALID_FIELD", "the registration is not complete", violations=problems)
    return NodeRegistration(
        node=message.node,
        incarnation=message.incarnation,
        address=message.address,
        agent_version=message.agent_version,
        preparation_version=message.preparation_version,
        devices=tuple(
            DeviceFacts(
                index=device.index,
                hardware_type=device.hardware_type,
                memory_bytes=device.memory_bytes,
                uuid=device.uuid,
            )
            for device in message.devices
        ),
    )


def assignment_to(record: AssignmentRecord) -> node_pb2.Assignment:
    message = node_pb2.Assignment(
        lease=node_pb2.Lease(
            token=record.lease_token,
            tuning_job=job_name(record.project_id, record.job_id),
            attempt=record.attempt,
        ),
        desired_state=node_pb2.DESIRED_STATE_CANCEL if record.cancelled else node_pb2.DESIRED_STATE_RUN,
        base_revision=record.base_revision,
        device_indices=record.device_indices,
        checkpoint_key_prefix=checkpoint_key_prefix(record.project_id, record.job_id),
        model_key_prefix=model_key_prefix(record.project_id),
    )
    _set_time(message.lease.expire_time, record.expires_at)
    message.spec.MergeFromString(record.spec)
    message.base_model.MergeFromString(record.base_artifact)
    message.training_file.MergeFromString(record.training_artifact)
    if record.validation_artifact is not None:
        message.validation_file.MergeFromString(record.validation_artifact)
    if record.counts is not None:
        message.counts.MergeFromString(record.counts)
    if record.node_count > 1:
        message.gang.CopyFrom(_gang_part(record))
    if record.start_weights is not None:
        message.start_from.MergeFromString(record.start_weights)
    if record.resume_step is not None and record.resume_artifact is not None:
        message.resume_from.step = record.resume_step
        message.resume_from.manifest_sha256 = record.resume_manifest_sha256 or ""
        message.resume_from.artifact.MergeFromString(record.resume_artifact)
    return message


def _gang_part(record: AssignmentRecord) -> node_pb2.GangPart:
    """The port follows from the token, so that all nodes agree; one that is taken fails the attempt, and the next has another."""
    host = record.leading_address.rpartition(":")[0]
    return node_pb2.GangPart(
        node_count=record.node_count,
        leads=record.lease_token == record.attempt_token,
        endpoint=f"{host}:{GANG_PORT_MIN + record.attempt_token % GANG_PORT_COUNT}",
        id=f"{record.job_id}-{record.attempt_token}",
        address=record.address.rpartition(":")[0],
    )


def allocation_to(record: AllocationRecord) -> allocations.Allocation:
    message = allocations.Allocation(
        lease_token=record.lease_token,
        node=record.node,
        device_indices=record.device_indices,
        hardware_type=record.hardware_type,
    )
    _set_time(message.expire_time, record.expires_at)
    return message


def artifact_from(encoded: bytes) -> artifact_pb2.Artifact:
    return artifact_pb2.Artifact.FromString(encoded)


def size_bytes_of(artifact: artifact_pb2.Artifact) -> int:
    return sum(file.size_bytes for file in artifact.files)


def timestamp_of(moment: datetime) -> Timestamp:
    message = Timestamp()
    _set_time(message, moment)
    return message


def field_violations(violations: list[Violation]) -> list[FieldViolation]:
    return [FieldViolation(violation.field, violation.description) for violation in violations]


def _at(field: str, description: str) -> FieldViolation:
    return FieldViolation(field, description)


def _set_time(message: Timestamp, moment: datetime | None) -> None:
    if moment is not None:
        # Whole numbers only: a float of seconds loses microseconds.
        delta = moment - _EPOCH
        message.seconds = delta.days * 86400 + delta.seconds
        message.nanos = delta.microseconds * 1000


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
