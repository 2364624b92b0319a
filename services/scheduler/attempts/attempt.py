"""What an attempt at a job is and reports, as frozen values. Pure: messages are encoded bytes."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from services.scheduler.jobs.job import LeaseRef
from services.scheduler.jobs.lifecycle import JobState


class AttemptOutcome(StrEnum):
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    # The lease ran out, or the node came back as a new incarnation.
    LOST = "LOST"


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
class NewCheckpoint:
    step: int
    manifest_sha256: str
    size_bytes: int
    artifact: bytes
    asked: bool = False


@dataclass(frozen=True, kw_only=True)
class BadCheckpoint:
    """A committed checkpoint whose files an attempt could not use."""

    step: int
    manifest_sha256: str


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A checkpoint that was recorded now; it replaces an earlier one of this step, whose artifact is `given_up`."""

    given_up: bytes | None


@dataclass(frozen=True, kw_only=True)
class MarkedBad:
    """How often the step's checkpoints were bad, and the step of the checkpoint before it, if there is one."""

    bad_count: int
    step_before: int | None


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What a successful attempt made; `artifact` is an encoded finemesh.artifacts.v1.Artifact."""

    revision: str
    kind: str
    adapter_rank: int
    lineage: dict[str, str]
    artifact: bytes
    stopped_early: bool = False
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The allocation of one node for an attempt. `ref` is the lease of the attempt, which in a gang another node may
    hold; it is None for an allocation that serves."""

    lease_token: int
    owner: str
    ref: LeaseRef | None
