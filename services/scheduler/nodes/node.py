"""What a node says of itself, and what it is told to do, as frozen values. Pure: messages are encoded bytes."""

from dataclasses import dataclass
from datetime import datetime

from services.scheduler.jobs.job import JobRef


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    index: int
    hardware_type: str
    memory_bytes: int
    uuid: str
    # Why nobody gets the device; empty for one that may be given out.
    set_aside_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeRegistration:
    node: str
    incarnation: str
    address: str
    agent_version: str
    preparation_version: str = ""
    devices: tuple[DeviceFacts, ...]


@dataclass(frozen=True, kw_only=True)
class AssignmentRecord(JobRef):
    """What a node shall do for one lease; bytes are encoded messages.

    `attempt_token` is the leading node's token, which is this one unless the node follows another. The addresses are
    `host:port` of the agents.
    """

    lease_token: int
    attempt_token: int
    node_count: int
    address: str
    leading_address: str
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


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A sign of life of a node, with the tokens of the leases that it works on."""

    node: str
    incarnation: str
    lease_tokens: tuple[int, ...]
