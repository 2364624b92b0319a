"""A request with every default filled in, and what its base model or the job that it continues does not allow. Pure."""

import re
from dataclasses import replace

from formats.learning_rates import default_learning_rate
from services.scheduler.spec.origin import Origin
from services.scheduler.spec.tuning_limits import Limits
from services.scheduler.spec.tuning_methods import Method, name_of, with_defaults
from services.scheduler.spec.tuning_spec import (
    ALL_LINEAR,
    PATIENCE_DEFAULT,
    WARMUP_EVALUATIONS_DEFAULT,
    EarlyStopping,
    Hyperparameters,
    Lora,
    Schedule,
    TuningSpec,
    Violation,
)

BATCH_SIZE_DEFAULT = 8


def complete(
    spec: TuningSpec, limits: Limits, job_id: str, origin: Origin | None = None
) -> tuple[TuningSpec, list[Violation]]:
    """`origin` is what spec.from_checkpoint names, of the same base model."""
    inherited = _inherit(spec, origin) if origin is not None else spec
    lora = _complete_lora(inherited.lora, limits) if inherited.lora is not None else None
    wanted = replace(
        inherited,
        output_name=spec.output_name or default_output_name(inherited.base_model, job_id),
        lora=lora,
        method=None if spec.method is None else with_defaults(spec.method),
        weights_given=True,
        gpu_count=spec.gpu_count or 1,
    )
    completed = replace(wanted, hyperparameters=_complete_hyperparameters(wanted, limits))
    violations = violations_of_limits(completed, limits)
    if origin is not None:
        violations += _violations_of_origin(completed, origin)
    return completed, violations


def violations_of_limits(spec: TuningSpec, limits: Limits) -> list[Violation]:
    """`spec` is complete."""
    found = []
    given, base = spec.hyperparameters, spec.base_model
    tokens_max = _sequence_tokens_max(spec.method, limits)
    if given.sequence_tokens_max > tokens_max:
        found.append(
            Violation(
                field="spec.hyperparameters.sequence_tokens_max",
                description=f"must be {limits.sequence_tokens_min} to {tokens_max}, the limit of {base}; "
                f"got {given.sequence_tokens_max}",
            )
        )
    if spec.lora is not None and spec.lora.rank > limits.lora_rank_max:
        found.append(
            Violation(
                field="spec.lora.rank",
                description=f"must be 1 to {limits.lora_rank_max}, the largest rank that {base} is served with; "
                f"got {spec.lora.rank}",
            )
        )
    batch_max = limits.batch_max(lora=spec.lora is not None, dpo=spec.method is not None)
    if not batch_max:
        field = f"spec.{name_of(spec.method)}" if spec.method is not None and not limits.batch_dpo else "spec.full"
        found.append(Violation(field=field, description=f"is not offered for {base}; see GetTuningLimits"))
    elif given.batch_size > batch_max or (given.batch_size_max and given.batch_size != batch_max):
        exactly = f"0 or {batch_max} with batch_size_max" if given.batch_size_max else f"1 to {batch_max}"
        found.append(
            Violation(
                field="spec.hyperparameters.batch_size",
                description=f"must be {exactly}, the limit of {base} for this kind of run; got {given.batch_size}",
            )
        )
    return found


def default_output_name(base_model: str, job_id: str) -> str:
    """The base's last part and the job's id, within the 63 characters of a name: `demo-llama-ft-01jd...`."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", base_model.rsplit("/", 1)[-1].lower()).strip("-._") or "model"
    return f"{stem[: 62 - len(job_id)]}-{job_id}"


def _inherit(spec: TuningSpec, origin: Origin) -> TuningSpec:
    """What is left out is as the job that is continued had it."""
    lora = spec.lora
    if not spec.weights_given:
        lora = origin.lora
    elif lora is not None and origin.lora is not None:
        rank = lora.rank or origin.lora.rank
        same_rank = rank == origin.lora.rank
        lora = replace(
            lora,
            rank=rank,
            alpha=lora.alpha or (origin.lora.alpha if same_rank else 0),
            target_modules=lora.target_modules or origin.lora.target_modules,
        )
    return replace(spec, base_model=spec.base_model or origin.base_model, lora=lora)


def _violations_of_origin(spec: TuningSpec, origin: Origin) -> list[Violation]:
    """Weights fit only where they came from: the same base, the same kind, an adapter of the same shape."""
    name, found = f"the weights of {origin.job_id}", []
    if spec.base_model != origin.base_model:
        description = f"must be {origin.base_model}, which {name} were trained on; got {spec.base_model}"
        found.append(Violation(field="spec.base_model", description=description))
    if (spec.lora is None) != (origin.lora is None):
        kind = "all weights" if origin.lora is None else "an adapter"
        description = f"{name} are {kind}; train the same, or leave lora and full out"
        found.append(Violation(field="spec.full" if spec.lora is None else "spec.lora", description=description))
    elif spec.lora is not None and origin.lora is not None:
        if spec.lora.rank != origin.lora.rank:
            description = f"must be {origin.lora.rank}, the rank of {name}; got {spec.lora.rank}"
            found.append(Violation(field="spec.lora.rank", description=description))
        if spec.lora.target_modules != origin.lora.target_modules:
            modules = ", ".join(origin.lora.target_modules) or "all linear layers"
            description = f"must be those of {name}: {modules}"
            found.append(Violation(field="spec.lora.target_modules", description=description))
    return found


def _complete_lora(lora: Lora, limits: Limits) -> Lora:
    rank = lora.rank or limits.lora_rank_default
    modules = tuple(sorted(set(lora.target_modules) - {ALL_LINEAR}))
    return replace(lora, rank=rank, alpha=lora.alpha or 2 * rank, target_modules=modules)


def _complete_hyperparameters(spec: TuningSpec, limits: Limits) -> Hyperparameters:
    given = spec.hyperparameters
    batch_size = given.batch_size or BATCH_SIZE_DEFAULT
    if given.batch_size_max and not given.batch_size:
        batch_size = limits.batch_max(lora=spec.lora is not None, dpo=spec.method is not None)
    return replace(
        given,
        epochs=given.epochs or 1,
        batch_size=batch_size,
        learning_rate=given.learning_rate or default_learning_rate(name_of(spec.method), lora=spec.lora is not None),
        gradient_norm_max=1.0 if given.gradient_norm_max is None else given.gradient_norm_max,
        sequence_tokens_max=given.sequence_tokens_max or _sequence_tokens_max(spec.method, limits),
        seed=42 if given.seed is None else given.seed,
        cycle_count=given.cycle_count or (0.5 if given.schedule is Schedule.COSINE else 0.0),
        gradient_accumulation_steps=given.gradient_accumulation_steps or 1,
        packing=spec.method is None if given.packing is None else given.packing,
        checkpoints=given.checkpoints or 1,
        early_stopping=None if given.early_stopping is None else _complete_stopping(given.early_stopping),
    )


def _complete_stopping(stopping: EarlyStopping) -> EarlyStopping:
    warmup = stopping.warmup_evaluations
    return replace(
        stopping,
        patience=stopping.patience or PATIENCE_DEFAULT,
        warmup_evaluations=WARMUP_EVALUATIONS_DEFAULT if warmup is None else warmup,
    )


def _sequence_tokens_max(method: Method | None, limits: Limits) -> int:
    return limits.sequence_tokens_max if method is None else limits.sequence_tokens_max_dpo
