"""What is wrong with a request for a tuning job, every violation at once, before any other service is asked. Pure.

Zero stands for the default where the contract says so; a negative, absurd or non-finite value is refused, never bent.
"""

import math
from collections.abc import Sequence

from services.scheduler.spec.origin import parse_origin
from services.scheduler.spec.tuning_methods import Method, name_of, problems_of
from services.scheduler.spec.tuning_spec import (
    ALL_LINEAR,
    BATCH_SIZE_MAX,
    CHECKPOINT_INTERVAL_STEPS_MAX,
    CHECKPOINTS_MAX,
    CYCLE_COUNT_MAX,
    EPOCHS_MAX,
    EVALUATIONS_MAX,
    GPU_COUNT_MAX,
    GRADIENT_ACCUMULATION_STEPS_MAX,
    GRADIENT_NORM_MAX,
    HUB_REPOSITORY,
    HUB_REVISION,
    LEARNING_RATE_MAX,
    LORA_ALPHA_MAX,
    LORA_DROPOUT_MAX,
    LORA_RANK_MAX,
    MIN_DELTA_MAX,
    MODEL_ID,
    MODEL_ID_CHARS_MAX,
    MODULE_NAME,
    OUTPUT_NAME,
    PATIENCE_DEFAULT,
    PATIENCE_MAX,
    SEED_MAX,
    SEQUENCE_TOKENS_MAX,
    SEQUENCE_TOKENS_MIN,
    TARGET_MODULES_MAX,
    WARMUP_EVALUATIONS_MAX,
    EarlyStopping,
    HubStart,
    Hyperparameters,
    Lora,
    Schedule,
    TuningSpec,
    Violation,
)


def violations_of(spec: TuningSpec) -> list[Violation]:
    """Everything that is wrong with the request itself, before any other service is asked."""
    check = _Check()
    check.names(spec)
    check.integer("spec.gpu_count", spec.gpu_count, 1, GPU_COUNT_MAX, zero="1")
    if spec.train_on_inputs is None:
        check.refuse("spec.supervised.train_on_inputs", "must be AUTO, TRUE or FALSE; got an unknown value")
    if spec.from_hub is not None:
        check.from_hub(spec, spec.from_hub)
    if spec.method is not None:
        check.method(spec.method)
    if spec.lora is not None:
        check.lora(spec.lora)
    check.hyperparameters(spec.hyperparameters)
    if spec.hyperparameters.early_stopping is not None:
        check.early_stopping(spec, spec.hyperparameters.early_stopping)
    if spec.hyperparameters.evaluations and not spec.validation_file:
        check.refuse(
            "spec.hyperparameters.evaluations",
            f"needs spec.validation_file; give one or set it to 0; got {spec.hyperparameters.evaluations}",
        )
    return check.violations


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
        if not spec.base_model and not spec.from_checkpoint:
            self.refuse("spec.base_model", "is missing; give the id of a base model, for example `finemesh/demo-llama`")
        elif spec.base_model and (len(spec.base_model) > MODEL_ID_CHARS_MAX or not MODEL_ID.fullmatch(spec.base_model)):
            self.refuse("spec.base_model", f"must be a model id of at most {MODEL_ID_CHARS_MAX} characters")
        if not spec.training_file:
            self.refuse("spec.training_file", "is missing; give `projects/{project}/files/{file}`")
        if spec.output_name and not OUTPUT_NAME.fullmatch(spec.output_name):
            self.refuse(
                "spec.output_name",
                "must be 1 to 63 lower-case letters, digits, `-`, `_` or `.`, beginning with a letter or digit; "
                f"got {spec.output_name[:80]!r}",
            )
        if spec.from_checkpoint and parse_origin(spec.from_checkpoint) is None:
            self.refuse(
                "spec.from_checkpoint",
                "must be a job or a model that one made, and at most a step: "
                "`ft-...`, `{project slug}/{name}` or `ft-...:120`; "
                f"got {spec.from_checkpoint[:80]!r}",
            )

    def from_hub(self, spec: TuningSpec, start: HubStart) -> None:
        if not HUB_REPOSITORY.fullmatch(start.repository):
            self.refuse("spec.from_hub.repository", "must be `{owner}/{name}` as the hub names repositories")
        if start.revision and not HUB_REVISION.fullmatch(start.revision):
            self.refuse("spec.from_hub.revision", "must be a commit, tag or branch of at most 200 characters")
        if spec.from_checkpoint:
            self.refuse("spec.from_hub", "excludes spec.from_checkpoint: a run starts from one of the two")

    def lora(self, lora: Lora) -> None:
        self.integer("spec.lora.rank", lora.rank, 1, LORA_RANK_MAX, zero="16")
        self.integer("spec.lora.alpha", lora.alpha, 1, LORA_ALPHA_MAX, zero="twice the rank")
        self.number("spec.lora.dropout", lora.dropout, 0.0, LORA_DROPOUT_MAX)
        self.target_modules(lora.target_modules)

    def target_modules(self, modules: Sequence[str]) -> None:
        if tuple(modules) == (ALL_LINEAR,):
            return
        if len(modules) > TARGET_MODULES_MAX:
            self.refuse("spec.lora.target_modules", f"must be at most {TARGET_MODULES_MAX} names; got {len(modules)}")
            return
        for index, name in enumerate(modules):
            if not MODULE_NAME.fullmatch(name):
                self.refuse(
                    f"spec.lora.target_modules[{index}]",
                    f"must be 1 to 200 letters, digits, `_` or `.`, or `{ALL_LINEAR}` alone; got {name[:80]!r}",
                )

    def method(self, method: Method) -> None:
        for setting, problem in problems_of(method):
            self.refuse(f"spec.{name_of(method)}.{setting}", problem)

    def early_stopping(self, spec: TuningSpec, stopping: EarlyStopping) -> None:
        at = "spec.hyperparameters.early_stopping"
        before = len(self.violations)
        self.integer(f"{at}.patience", stopping.patience, 1, PATIENCE_MAX, zero=str(PATIENCE_DEFAULT))
        self.number(f"{at}.min_delta", stopping.min_delta, 0, MIN_DELTA_MAX)
        if stopping.warmup_evaluations is not None:
            self.integer(f"{at}.warmup_evaluations", stopping.warmup_evaluations, 0, WARMUP_EVALUATIONS_MAX)
        if not spec.validation_file:
            self.refuse(at, "needs spec.validation_file: without evaluations nothing can be seen to get worse")
            return
        given = spec.hyperparameters
        total = (given.epochs or 1) * given.evaluations
        if len(self.violations) == before and total < stopping.evaluations_min:
            self.refuse(
                at,
                f"needs at least patience + warmup_evaluations + 1 = {stopping.evaluations_min} evaluations "
                "over the run; "
                f"epochs times evaluations is {total}",
            )

    def hyperparameters(self, given: Hyperparameters) -> None:
        at = "spec.hyperparameters"
        self.integer(f"{at}.epochs", given.epochs, 1, EPOCHS_MAX, zero="1")
        self.integer(f"{at}.evaluations", given.evaluations, 0, EVALUATIONS_MAX)
        self.integer(f"{at}.batch_size", given.batch_size, 1, BATCH_SIZE_MAX, zero="8")
        if not math.isfinite(given.learning_rate) or not 0 <= given.learning_rate <= LEARNING_RATE_MAX:
            self.refuse(
                f"{at}.learning_rate",
                f"must be above 0 to {LEARNING_RATE_MAX:g}, or 0 for the default of the method and weights; "
                f"got {given.learning_rate:g}",
            )
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
        if not math.isfinite(given.cycle_count) or not 0 <= given.cycle_count <= CYCLE_COUNT_MAX:
            self.refuse(
                f"{at}.cycle_count", f"must be above 0 to {CYCLE_COUNT_MAX:g}, or 0 for 0.5; got {given.cycle_count:g}"
            )
        elif given.cycle_count and given.schedule is Schedule.LINEAR:
            self.refuse(f"{at}.cycle_count", f"belongs to the COSINE schedule; got {given.cycle_count:g} with LINEAR")
        self.integer(
            f"{at}.gradient_accumulation_steps",
            given.gradient_accumulation_steps,
            1,
            GRADIENT_ACCUMULATION_STEPS_MAX,
            zero="1",
        )
        self.integer(f"{at}.checkpoints", given.checkpoints, 1, CHECKPOINTS_MAX, zero="1")
