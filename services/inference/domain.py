"""What inference knows: base models, tuned models, endpoints. It knows neither messages of the wire nor tables."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of a model in the artifact store; `path` is relative to the model's key."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A set of files that an engine can load; `revision` is derived from their contents."""

    revision: str
    key: str
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A model of the catalogue."""

    model_id: str
    weights: Weights
    architecture: str
    parameter_count: int
    context_tokens_max: int
    size_bytes: int
    created_at: datetime
    # Where the files come from, as the importer said.
    source: str = ""


class ModelKind(enum.StrEnum):
    """Whether a tuned model is an adapter or a whole model."""

    ADAPTER = "adapter"
    FULL = "full"


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """A model that a job made; `model_id` is `{project slug}/{output name}`."""

    id: str
    project_id: str
    model_id: str
    kind: ModelKind
    base_model: str
    base_revision: str
    weights: Weights
    adapter_rank: int
    tuning_job: str
    lineage: Mapping[str, str]
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A dedicated endpoint. `lease_token` is that of its devices, None while it holds none."""

    id: str
    project_id: str
    organization_id: str
    endpoint_id: str
    model: str
    hardware_type: str
    gpu_count: int
    state: str
    status_message: str
    lease_token: int | None
    device_indices: tuple[int, ...]
    ready_at: datetime | None
    stopped_at: datetime | None
    created_at: datetime
    billed_minutes: int
    period_minutes: int


@dataclass(frozen=True, kw_only=True)
class UsageOfCall:
    """Tokens that one generation used, and for whom."""

    generation_id: str
    project_id: str
    organization_id: str
    model_id: str
    base_model: str
    input_tokens: int
    output_tokens: int
    ended_at: datetime
    # The key that called; empty where there is none.
    api_key_id: str = ""


def revision_of(files: Mapping[str, str]) -> str:
    """The revision of a set of files, from path -> lower-case hex SHA-256: the same contents, the same revision."""
    digest = hashlib.sha256()
    for path, sha256 in sorted(files.items()):
        digest.update(f"{path}\0{sha256}\n".encode())
    return f"rv_{digest.hexdigest()[:32]}"
