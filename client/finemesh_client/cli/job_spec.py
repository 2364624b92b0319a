"""Command-line options to a TuningSpec. It fills no defaults: the server does, and shows them in the quote."""

from __future__ import annotations

from dataclasses import dataclass

from finemesh.tuning.v1 import tuning_job_pb2 as pb

SCHEDULES = {
    "cosine": pb.LEARNING_RATE_SCHEDULE_COSINE,
    "linear": pb.LEARNING_RATE_SCHEDULE_LINEAR,
}
TRAIN_ON_INPUTS = {
    "auto": pb.TRAIN_ON_INPUTS_AUTO,
    "true": pb.TRAIN_ON_INPUTS_TRUE,
    "false": pb.TRAIN_ON_INPUTS_FALSE,
}


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What the user gave; None means not given."""

    model: str
    training_file: str
    validation_file: str = ""
    output_name: str = ""
    full: bool = False
    rank: int | None = None
    alpha: int | None = None
    dropout: float | None = None
    epochs: int | None = None
    evaluations: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup_ratio: float | None = None
    train_on_inputs: str = "auto"
    sequence_tokens_max: int | None = None
    seed: int | None = None
    checkpoint_interval_steps: int | None = None
    gpus: int | None = None


def given(**values: object) -> dict[str, object]:
    """Only what is not None, so that the server sees what was really asked for."""
    return {name: value for name, value in values.items() if value is not None}


def to_spec(options: JobOptions) -> pb.TuningSpec:
    """The contract's spec."""
    hyperparameters = pb.Hyperparameters(
        learning_rate_schedule=SCHEDULES[options.schedule],
        **given(  # type: ignore[arg-type]
            epochs=options.epochs,
            evaluations=options.evaluations,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_ratio=options.warmup_ratio,
            sequence_tokens_max=options.sequence_tokens_max,
            seed=options.seed,
            checkpoint_interval_steps=options.checkpoint_interval_steps,
        ),
    )
    spec = pb.TuningSpec(
        base_model=options.model,
        training_file=options.training_file,
        validation_file=options.validation_file,
        output_name=options.output_name,
        supervised=pb.SupervisedMethod(train_on_inputs=TRAIN_ON_INPUTS[options.train_on_inputs]),
        hyperparameters=hyperparameters,
        **given(gpu_count=options.gpus),  # type: ignore[arg-type]
    )
    if options.full:
        spec.full.SetInParent()
    else:
        lora = given(rank=options.rank, alpha=options.alpha, dropout=options.dropout)
        spec.lora.CopyFrom(pb.LoraTraining(**lora))  # type: ignore[arg-type]
    return spec
