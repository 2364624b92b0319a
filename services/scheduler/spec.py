"""What a tuning job may ask for: defaults and bounds, every violation at once. It knows no protobuf and asks nobody.

Zero stands for the default where the contract says so; a negative, absurd or non-finite value is refused, never bent.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

EPOCHS_MAX = 100
EVALUATIONS_MAX = 100
BATCH_SIZE_MAX = 4096
GRADIENT_NORM_MAX = 1000.0
CHECKPOINT_INTERVAL_STEPS_MAX = 1_000_000
SEQUENCE_TOKENS_MIN = 16
SEQUENCE_TOKENS_MAX = 131_072
LORA_RANK_MAX = 256
LORA_ALPHA_MAX = 1024
LORA_DROPOUT_MAX = 0.9
TARGET_MODULES_MAX = 64
SEED_MAX = 2**32 - 1
GPU_COUNT_MAX = 1024
MODEL_ID_CHARS_MAX = 200

OUTPUT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


class TrainOnInputs(StrEnum):
    AUTO = "auto"
    TRUE = "true"
    FALSE = "false"


class Schedule(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Zero rank and zero alpha stand for the defaults."""

    rank: int = 0
    alpha: int = 0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Zero (None where zero has a meaning) stands for the default."""

    epochs: int = 0
    evaluations: int | None = None
    batch_size: int = 0
    learning_rate: float = 0.0
    warmup_ratio: float = 0.0
    schedule: Schedule | None = Schedule.COSINE
    min_learning_rate_ratio: float = 0.0
    weight_decay: float = 0.0
    gradient_norm_max: float | None = None
    sequence_tokens_max: int = 0
    seed: int | None = None
    checkpoint_interval_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class TuningSpec:
    """The request as it came, or with every default filled in. `lora` None trains all weights; an enum that the
    contract does not know is None."""

    base_model: str
    training_file: str
    validation_file: str = ""
    output_name: str = ""
    train_on_inputs: TrainOnInputs | None = TrainOnInputs.AUTO
    lora: Lora | None = Lora()
    hyperparameters: Hyperparameters = Hyperparameters()
    gpu_count: int = 0


@dataclass(frozen=True, kw_only=True)
class BaseLimits:
    """What the base model allows; zero means that it sets no limit."""

    context_tokens_max: int
    adapter_rank_max: int


@dataclass(frozen=True, kw_only=True)
class Violation:
    """`field` is the path in the request, for example `spec.hyperparameters.epochs`."""

    field: str
    description: str


def violations_of(spec: TuningSpec) -> list[Violation]:
    """Everything that is wrong with the request itself, before any other service is asked."""
    check = _Check()
    check.names(spec)
    check.integer("spec.gpu_count", spec.gpu_count, 1, GPU_COUNT_MAX, zero="1")
    if spec.train_on_inputs is None:
        check.refuse("spec.supervised.train_on_inputs", "must be AUTO, TRUE or FALSE; got an unknown value")
    if spec.lora is not None:
        check.lora(spec.lora)
    check.hyperparameters(spec.hyperparameters)
    if spec.hyperparameters.evaluations and not spec.validation_file:
        check.refuse(
            "spec.hyperparameters.evaluations",
            f"needs spec.validation_file; give one or set it to 0; got {spec.hyperparameters.evaluations}",
        )
    return check.violations


def complete(spec: TuningSpec, base: BaseLimits, job_id: str) -> tuple[TuningSpec, list[Violation]]:
    """The spec with every default filled in, and what the base model does not allow."""
    check = _Check()
    context_tokens_max = min(base.context_tokens_max or SEQUENCE_TOKENS_MAX, SEQUENCE_TOKENS_MAX)
    given = spec.hyperparameters.sequence_tokens_max
    if given > context_tokens_max:
        check.refuse(
            "spec.hyperparameters.sequence_tokens_max",
            f"must be {SEQUENCE_TOKENS_MIN} to {context_tokens_max}, the limit of {spec.base_model}; got {given}",
        )
    lora = _complete_lora(spec.lora) if spec.lora is not None else None
    if lora is not None and base.adapter_rank_max and lora.rank > base.adapter_rank_max:
        check.refuse(
            "spec.lora.rank",
            f"must be 1 to {base.adapter_rank_max}, the largest rank that {spec.base_model} is served with; got {lora.rank}",
        )
    completed = replace(
        spec,
        output_name=spec.output_name or default_output_name(spec.base_model, job_id),
        lora=lora,
        hyperparameters=_complete_hyperparameters(spec, context_tokens_max),
        gpu_count=spec.gpu_count or 1,
    )
    return completed, check.violations


def default_output_name(base_model: str, job_id: str) -> str:
    """The base's last part and the job's id, within the 63 characters of a name: `demo-llama-ft-01jd...`."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", base_model.rsplit("/", 1)[-1].lower()).strip("-._") or "model"
    return f"{stem[: 62 - len(job_id)]}-{job_id}"


def _complete_lora(lora: Lora) -> Lora:
    rank = lora.rank or 16
    return replace(
        lora, rank=rank, alpha=lora.alpha or 2 * rank, target_modules=tuple(sorted(set(lora.target_modules)))
    )


def _complete_hyperparameters(spec: TuningSpec, context_tokens_max: int) -> Hyperparameters:
    given = spec.hyperparameters
    evaluations = given.evaluations
    if evaluations is None:
        evaluations = 1 if spec.validation_file else 0
    return replace(
        given,
        epochs=given.epochs or 1,
        evaluations=evaluations,
        batch_size=given.batch_size or 8,
        learning_rate=given.learning_rate or 1e-4,
        gradient_norm_max=1.0 if given.gradient_norm_max is None else given.gradient_norm_max,
        sequence_tokens_max=given.sequence_tokens_max or context_tokens_max,
        seed=42 if given.seed is None else given.seed,
    )


class _Check:
    """Collects violations; every one says the range and what was given."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def refuse(self, field: str, description: str) -> None:
        self.violations.append(Violation(field=field, description=description))

    def integer(self, field: str, value: int, low: int, high: int, *, zero: str = "") -> None:
        """`zero` names the default that zero stands for; empty: zero is a value like any other."""
        if zero and value == 0:
            return
        if not low <= value <= high:
            hint = f", or 0 for {zero}" if zero else ""
            self.refuse(field, f"must be {low} to {high}{hint}; got {value}")

    def number(self, field: str, value: float, low: float, high: float) -> None:
        if not math.isfinite(value) or not low <= value <= high:
            self.refuse(field, f"must be {low:g} to {high:g}; got {value:g}")

    def names(self, spec: TuningSpec) -> None:
        if not spec.base_model:
            self.refuse("spec.base_model", "is missing; give the id of a base model, for example `finemesh/demo-llama`")
        elif len(spec.base_model) > MODEL_ID_CHARS_MAX or not _MODEL_ID.fullmatch(spec.base_model):
            self.refuse("spec.base_model", f"must be a model id of at most {MODEL_ID_CHARS_MAX} characters")
        if not spec.training_file:
            self.refuse("spec.training_file", "is missing; give `projects/{project}/files/{file}`")
        if spec.output_name and not OUTPUT_NAME.fullmatch(spec.output_name):
            self.refuse(
                "spec.output_name",
                "must be 1 to 63 lower-case letters, digits, `-`, `_` or `.`, beginning with a letter or digit; "
                f"got {spec.output_name[:80]!r}",
            )

    def lora(self, lora: Lora) -> None:
        self.integer("spec.lora.rank", lora.rank, 1, LORA_RANK_MAX, zero="16")
        self.integer("spec.lora.alpha", lora.alpha, 1, LORA_ALPHA_MAX, zero="twice the rank")
        self.number("spec.lora.dropout", lora.dropout, 0.0, LORA_DROPOUT_MAX)
        self.target_modules(lora.target_modules)

    def target_modules(self, modules: Sequence[str]) -> None:
        if len(modules) > TARGET_MODULES_MAX:
            self.refuse("spec.lora.target_modules", f"must be at most {TARGET_MODULES_MAX} names; got {len(modules)}")
            return
        for index, name in enumerate(modules):
            if not _MODULE_NAME.fullmatch(name):
                self.refuse(
                    f"spec.lora.target_modules[{index}]",
                    f"must be 1 to 200 letters, digits, `_` or `.`; got {name[:80]!r}",
                )

    def hyperparameters(self, given: Hyperparameters) -> None:
        at = "spec.hyperparameters"
        self.integer(f"{at}.epochs", given.epochs, 1, EPOCHS_MAX, zero="1")
        if given.evaluations is not None:
            self.integer(f"{at}.evaluations", given.evaluations, 0, EVALUATIONS_MAX)
        self.integer(f"{at}.batch_size", given.batch_size, 1, BATCH_SIZE_MAX, zero="8")
        if not math.isfinite(given.learning_rate) or not 0 <= given.learning_rate <= 1:
            self.refuse(f"{at}.learning_rate", f"must be above 0 to 1, or 0 for 1e-4; got {given.learning_rate:g}")
        self.number(f"{at}.warmup_ratio", given.warmup_ratio, 0, 1)
        if given.schedule is None:
            self.refuse(f"{at}.learning_rate_schedule", "must be COSINE or LINEAR; got an unknown value")
        self.number(f"{at}.min_learning_rate_ratio", given.min_learning_rate_ratio, 0, 1)
        self.number(f"{at}.weight_decay", given.weight_decay, 0, 1)
        if given.gradient_norm_max is not None:
            self.number(f"{at}.gradient_norm_max", given.gradient_norm_max, 0, GRADIENT_NORM_MAX)
        self.integer(
            f"{at}.sequence_tokens_max",
            given.sequence_tokens_max,
            SEQUENCE_TOKENS_MIN,
            SEQUENCE_TOKENS_MAX,
            zero="the base model's limit",
        )
        if given.seed is not None:
            self.integer(f"{at}.seed", given.seed, 0, SEED_MAX)
        self.integer(
            f"{at}.checkpoint_interval_steps",
            given.checkpoint_interval_steps,
            1,
            CHECKPOINT_INTERVAL_STEPS_MAX,
            zero="the trainer's choice",
        )
