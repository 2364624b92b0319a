"""What the scheduler's modules say to one another: jobs, attempts, nodes, leases as frozen values.

It knows neither protobuf nor SQL. Parts of a job that are only stored and passed on stay encoded bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from services.scheduler.lifecycle import JobState


class EventKind(StrEnum):
    """Kinds of a job's event log, as TuningJobEventKind without the prefix."""

    STATE_CHANGED = "STATE_CHANGED"
    METRICS = "METRICS"
    EVALUATION = "EVALUATION"
    CHECKPOINT = "CHECKPOINT"
    REQUEUED = "REQUEUED"
    WARNING = "WARNING"
    STOPPED_EARLY = "STOPPED_EARLY"


class Ending(StrEnum):
    """How a job ended as far as money is concerned, as TuningJobEnding without the prefix."""

    COMPLETED = "COMPLETED"
    STOPPED_EARLY = "STOPPED_EARLY"
    CANCELLED_RUNNING = "CANCELLED_RUNNING"
    CANCELLED_BEFORE_RUN = "CANCELLED_BEFORE_RUN"
    PLATFORM_FAILURE = "PLATFORM_FAILURE"
    USER_FAILURE = "USER_FAILURE"
    REFUSED = "REFUSED"


class AttemptOutcome(StrEnum):
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    # The lease ran out, or the node came back as a new incarnation.
    LOST = "LOST"


class AllocationKind(StrEnum):
    TRAINING = "TRAINING"
    SERVING = "SERVING"


@dataclass(frozen=True, kw_only=True)
class JobFailure:
    """What ends a job: `reason` is a name of ErrorReason, `message` says what happened and what to do."""

    reason: str
    message: str
    platform_fault: bool
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One row of `jobs`. `spec`, `counts`, `progress` and `error` are the encoded messages of finemesh.tuning.v1."""

    project_id: str
    job_id: str
    organization_id: str
    namespace: str
    state: JobState
    spec: bytes
    base_model: str
    base_revision: str
    output_name: str
    gpu_count: int
    memory_bytes_min: int
    counts: bytes | None
    quoted_nanos_usd: int
    price_book_version: str
    hold_id: str
    progress: bytes | None
    error: bytes | None
    output_revision: str
    attempt_count: int
    failure_count: int
    waiting_message: str
    create_time: datetime
    queue_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    update_time: datetime

    @property
    def output_model(self) -> str:
        return f"{self.namespace}/{self.output_name}"


@dataclass(frozen=True, kw_only=True)
class JobRef:
    project_id: str
    job_id: str


@dataclass(frozen=True, kw_only=True)
class LeaseRef(JobRef):
    """A job as the holder of a lease names it."""

    lease_token: int


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Why a job waits; `position` is 0 for one that is not in the queue yet."""

    position: int
    waiting_for: str
    estimated_wait_s: int | None


@dataclass(frozen=True, kw_only=True)
class LeasedJob:
    """What a report of the lease's holder is judged by; `progress` is the last recorded TuningProgress."""

    organization_id: str
    namespace: str
    state: JobState
    base_model: str
    base_revision: str
    output_name: str
    attempt_count: int
    failure_count: int
    start_time: datetime | None
    progress: bytes | None
    progress_step: int | None
    progress_token: int | None
    node: str


@dataclass(frozen=True, kw_only=True)
class ClaimedJob(JobRef):
    """A job that a worker analyses and prices; bytes are encoded messages."""

    claim: UUID
    organization_id: str
    api_key_id: str
    spec: bytes
    base_model: str
    base_revision: str
    parameter_count: int
    base_artifact: bytes
    training_artifact: bytes
    validation_artifact: bytes | None
    service_failures: int


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What is stored when a job is acknowledged; the artifacts are encoded finemesh.artifacts.v1.Artifact."""

    project_id: str
    job_id: str
    organization_id: str
    # The key that asked for it, whose spend cap applies.
    api_key_id: str
    namespace: str
    request_id: str | None
    request_sha256: str
    spec: bytes
    base_model: str
    base_revision: str
    parameter_count: int
    output_name: str
    gpu_count: int
    memory_bytes_min: int
    base_artifact: bytes
    training_artifact: bytes
    validation_artifact: bytes | None
    # Encoded finemesh.nodes.v1.StartWeights of a run that continues another one.
    start_weights: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Transitioned:
    """A guarded UPDATE that found its row: what the event log and the events say about it."""

    project_id: str
    job_id: str
    organization_id: str
    from_state: JobState
    to_state: JobState
    sequence: int
    start_time: datetime | None
    attempt_count: int


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One line of a job's history; `progress` is an encoded TuningProgress."""

    sequence: int
    event_time: datetime
    kind: EventKind
    message: str
    state: JobState
    progress: bytes | None


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A committed checkpoint; `artifact` is an encoded finemesh.artifacts.v1.Artifact."""

    step: int
    attempt: int
    manifest_sha256: str
    size_bytes: int
    artifact: bytes
    create_time: datetime
    asked: bool


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a range of steps, [start_step, end_step), or of the evaluation after start_step."""

    kind: str
    start_step: int
    end_step: int
    tokens: int

    def work_key(self, job_id: str) -> str:
        """The identity of the work itself: redone after a crash, it has the same key."""
        if self.kind == "evaluate":
            return f"{job_id}:evaluate:{self.start_step}"
        return f"{job_id}:{self.kind}:{self.start_step}-{self.end_step}"


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    index: int
    hardware_type: str
    memory_bytes: int
    uuid: str


@dataclass(frozen=True, kw_only=True)
class NodeRegistration:
    node: str
    incarnation: str
    address: str
    agent_version: str
    preparation_version: str = ""
    devices: tuple[DeviceFacts, ...]


@dataclass(frozen=True, kw_only=True)
class AllocationRecord:
    """A live allocation: the right of one owner to devices of one node."""

    lease_token: int
    owner: str
    kind: AllocationKind
    node: str
    hardware_type: str
    device_indices: tuple[int, ...]
    expires_at: datetime


@dataclass(frozen=True, kw_only=True)
class AssignmentRecord:
    """What a node shall do for one lease; bytes are encoded messages. `attempt_token` is the leading node's, which is this one
    unless it follows; addresses are `host:port` of the agents."""

    lease_token: int
    attempt_token: int
    node_count: int
    address: str
    leading_address: str
    project_id: str
    job_id: str
    attempt: int
    expires_at: datetime
    cancelled: bool
    spec: bytes
    base_revision: str
    base_artifact: bytes
    training_artifact: bytes
    validation_artifact: bytes | None
    counts: bytes | None
    start_weights: bytes | None
    device_indices: tuple[int, ...]
    resume_step: int | None
    resume_artifact: bytes | None
    resume_manifest_sha256: str | None
