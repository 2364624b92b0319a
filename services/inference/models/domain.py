"""What the catalogue and the registry hold: base models, tuned models and their weights."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from chassis.errors import AlreadyExists, FieldViolation, InvalidArgument, NotFound, invalid
from formats.manifests import FileDigest
from services.inference.engines.answer_form import AnswerParsers

# What the owner of an imported model begins with; no job is named so.
IMPORTED = "import:"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A set of files that an engine can load; `revision` is derived from their contents."""

    revision: str
    key: str
    files: tuple[FileDigest, ...]


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
    # What reads its answers, and those of models that are tuned from it.
    parsers: AnswerParsers = field(default_factory=AnswerParsers)
    # Whether its chat template is the importer's, not its authors'.
    chat_template_given: bool = False


class ModelKind(enum.StrEnum):
    """Whether a tuned model is an adapter or a whole model."""

    ADAPTER = "adapter"
    FULL = "full"


class NameKind(enum.StrEnum):
    """What a name that chat calls use can mean. All kinds share one namespace."""

    BASE = "base"
    TUNED = "tuned"
    ENDPOINT = "endpoint"


class NamespaceKind(enum.StrEnum):
    """Whose names begin with a namespace, the part before the slash; it is never both."""

    BASES = "bases"
    PROJECT = "project"


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """A model that a job made, or an adapter that its owner imported, which has no `tuning_job`. `model_id` is
    `{project slug}/{output name}`."""

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

    @property
    def is_imported(self) -> bool:
        return not self.tuning_job

    @property
    def owner(self) -> str:
        """Who has the model's name: its job, which makes one model however often that is told, or its import."""
        return self.tuning_job or f"{IMPORTED}{self.id}"


def unknown_model(model: str) -> NotFound:
    """The error for a model that is not there for this caller; a foreign one answers the same."""
    message = f"no model {model[:200]!r} for this project; `finemesh models list` shows what there is"
    return NotFound("MODEL_UNKNOWN", message, metadata={"model": model[:200]})


def name_taken(name: str, what: str) -> AlreadyExists:
    """The error for a name that means something else already; `what` says where to choose another."""
    return AlreadyExists("ALREADY_EXISTS", f"{name} is taken by another model or endpoint; choose another {what}")


def namespace_taken(namespace: str, whose: str, what: str) -> AlreadyExists:
    """The error for a namespace that is the other kind's; `what` says which field to change."""
    problem = f"{namespace} is the namespace of {whose}; choose another one"
    return AlreadyExists("ALREADY_EXISTS", problem, violations=[FieldViolation(what, problem)])


def model_invalid(field: str, problem: str, reason: str = "MODEL_INVALID") -> InvalidArgument:
    """The error for a file of a model, or a field of its import, that is not taken."""
    return invalid(field, problem, message=f"{field}: {problem}", reason=reason)
