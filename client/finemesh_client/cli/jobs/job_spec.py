"""Command-line options to a TuningSpec.

It fills no defaults and checks no ranges: the server does, and shows them in the quote.
"""

from __future__ import annotations

from google.protobuf.message import Message

from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client.cli.datasets.preview_command import TRAIN_ON_INPUTS
from finemesh_client.cli.jobs.job_options import METHOD_SETTINGS, SCHEDULES, SFT, JobOptions
from finemesh_client.cli.runtime import OptionConflict
from finemesh_client.training_kinds import METHOD_FIELDS

BATCH_SIZE_MAX = "max"


def given(**values: object) -> dict[str, object]:
    """Only what is not None, so that the server sees what was really asked for."""
    return {name: value for name, value in values.items() if value is not None}


def to_spec(options: JobOptions) -> pb.TuningSpec:
    """The contract's spec. OptionConflict for options that exclude one another."""
    _refuse_conflicts(options)
    spec = pb.TuningSpec(
        base_model=options.model,
        from_checkpoint=options.from_checkpoint,
        training_file=options.training_file,
        validation_file=options.validation_file,
        output_name=options.output_name,
        hyperparameters=_hyperparameters(options),
        **given(gpu_count=options.gpus),  # type: ignore[arg-type]
    )
    if options.method in METHOD_SETTINGS:
        _set_method(getattr(spec, METHOD_FIELDS[options.method]), options)
    else:
        spec.supervised.train_on_inputs = TRAIN_ON_INPUTS[options.train_on_inputs or "auto"]
    _set_integrations(spec, options)
    if options.from_hf_model:
        spec.from_hub.repository, spec.from_hub.revision = options.from_hf_model, options.hf_model_revision
    lora = _lora(options)
    if options.full:
        spec.full.SetInParent()
    elif lora is not None:
        spec.lora.CopyFrom(lora)
    return spec


def _refuse_conflicts(options: JobOptions) -> None:
    if not options.model and not options.from_checkpoint:
        raise OptionConflict("give --model, or --from a job, model or checkpoint to continue")
    if options.from_hf_model and (options.from_checkpoint or not options.model):
        raise OptionConflict("--from-hf-model: needs --model, whose shape it has, and excludes --from")
    if options.hf_model_revision and not options.from_hf_model:
        raise OptionConflict("--hf-model-revision: only with --from-hf-model")
    for method in METHOD_SETTINGS:
        wrong = [f"--{name.replace('_', '-')}" for name in _given_settings(options, method)]
        if options.method != method and wrong:
            raise OptionConflict(f"{', '.join(wrong)}: only with --method {method}")
    if options.method != SFT and options.train_on_inputs is not None:
        raise OptionConflict(
            "--train-on-inputs: only with --method sft; preferences and feedback teach by their answers"
        )
    if options.full and (options.lora or _gave_lora(options)):
        raise OptionConflict("--full trains all weights; leave --lora, --rank, --alpha, --dropout and --target out")
    if options.batch_size not in (None, BATCH_SIZE_MAX) and not str(options.batch_size).isdecimal():
        raise OptionConflict("--batch-size: give a number of sequences, or max")


def _given_settings(options: JobOptions, method: str) -> dict[str, object]:
    """The options of a method that were given; a flag that is not set was not."""
    values = {name: getattr(options, name) for name in METHOD_SETTINGS[method]}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def _set_method(message: Message, options: JobOptions) -> None:
    message.SetInParent()
    for name, value in _given_settings(options, options.method).items():
        setattr(message, METHOD_SETTINGS[options.method][name], value)


def _gave_lora(options: JobOptions) -> bool:
    return bool(given(r=options.rank, a=options.alpha, d=options.dropout)) or bool(options.target_modules)


def _lora(options: JobOptions) -> pb.LoraTraining | None:
    """None leaves the choice to the job that is continued."""
    if options.from_checkpoint and not options.lora and not _gave_lora(options):
        return None
    values = given(rank=options.rank, alpha=options.alpha, dropout=options.dropout)
    return pb.LoraTraining(target_modules=options.target_modules or (), **values)  # type: ignore[arg-type]


def _hyperparameters(options: JobOptions) -> pb.Hyperparameters:
    is_max = options.batch_size == BATCH_SIZE_MAX
    return pb.Hyperparameters(
        learning_rate_schedule=SCHEDULES[options.schedule],
        batch_size_max=is_max,
        early_stopping=_early_stopping(options),
        **given(  # type: ignore[arg-type]
            batch_size=None if is_max or options.batch_size is None else int(options.batch_size),
            epochs=options.epochs,
            evaluations=options.evaluations,
            checkpoints=options.checkpoints,
            checkpoint_interval_steps=options.checkpoint_interval_steps,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            packing=options.packing,
            learning_rate=options.learning_rate,
            min_learning_rate_ratio=options.min_learning_rate_ratio,
            cycle_count=options.cycle_count,
            warmup_ratio=options.warmup_ratio,
            weight_decay=options.weight_decay,
            gradient_norm_max=options.gradient_norm_max,
            sequence_tokens_max=options.sequence_tokens_max,
            seed=options.seed,
        ),
    )


def _set_integrations(spec: pb.TuningSpec, options: JobOptions) -> None:
    """One of its settings asks for an integration, too."""
    wandb = given(
        project=options.wandb_project,
        entity=options.wandb_entity,
        run_name=options.wandb_name,
        base_url=options.wandb_url,
    )
    if wandb:
        spec.integrations.wandb.CopyFrom(pb.WandbRun(**wandb))  # type: ignore[arg-type]
    if options.hf_push_to is not None:
        spec.integrations.hub_push.repository = options.hf_push_to


def _early_stopping(options: JobOptions) -> pb.EarlyStopping | None:
    """One of its settings turns it on, too."""
    values = given(
        patience=options.patience, min_delta=options.min_delta, warmup_evaluations=options.warmup_evaluations
    )
    return pb.EarlyStopping(**values) if values or options.early_stopping else None  # type: ignore[arg-type]
