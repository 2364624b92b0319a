"""A job, its history and its checkpoints as frozen values. Pure.

Parts of a job that are only stored and passed on stay encoded bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from services.scheduler.jobs.lifecycle import JobState


class EventKind(StrEnum):
    """Kinds of a job's event log, as TuningJobEventKind without the prefix."""

    STATE_CHANGED = "STATE_CHANGED"
    METRICS = "METRICS"
    EVALUATION = "EVALUATION"
    CHECKPOINT = "CHECKPOINT"
    REQUEUED = "REQUEUED"
    WARNING = "WARNING"
    STOPPED_EARLY = "STOPPED_EARLY"


@dataclass(frozen=True, kw_only=True)
class JobRef:
    project_id: str
    job_id: str


@dataclass(frozen=True, kw_only=True)
class LeaseRef(JobRef):
    """A job as the holder of a lease names it."""

    lease_token: int


@dataclass(frozen=True, kw_only=True)
class Job(JobRef):
    """One row of `jobs`. `spec`, `counts`, `outlook`, `progress` and `error` are the encoded messages of
    finemesh.tuning.v1."""

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
    outlook: bytes | None
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
    # When the owner deleted the model that the job made.
    model_delete_time: datetime | None = None
    # The number of the history's last line, and what changes whenever the row does; of one job alone, not of lists.
    last_sequence: int = 0
    row_version: int = 0

    @property
    def output_model(self) -> str:
        return f"{self.namespace}/{self.output_name}"


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Why a job waits; `position` is 0 for one that is not in the queue yet."""

    position: int
    waiting_for: str
    estimated_wait_s: int | None


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """What a queued job asks for; `failed_nodes` are those on which attempts at it failed."""

    ref: JobRef
    gpu_count: int
    memory_bytes_min: int
    failed_nodes: frozenset[str] = frozenset()
    queue_time: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class NewJob(JobRef):
    """What is stored when a job is acknowledged; the artifacts are encoded finemesh.artifacts.v1.Artifact."""

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
    # Of both files together.
    dataset_bytes: int = 0
    # Encoded finemesh.nodes.v1.StartWeights of a run that continues another one.
    start_weights: bytes | None = None
    # The job whose model those weights are; none for a checkpoint.
    start_model_job_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Transitioned(JobRef):
    """A guarded UPDATE that found its row: what the event log and the events say about it."""

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
class TunedModel:
    """The model that a job made; `artifact` is an encoded finemesh.artifacts.v1.Artifact."""

    model_id: str
    revision: str
    kind: str
    adapter_rank: int
    base_model: str
    base_revision: str
    artifact: bytes
    lineage: Mapping[str, str]
