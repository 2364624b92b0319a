"""Between finemesh.tuning.v1.TuningSpec and the scheduler's own spec, both ways, and its limits. It judges nothing."""

from collections.abc import Sequence
from dataclasses import fields

from chassis.errors import FieldViolation
from finemesh.artifacts.v1 import model_artifact_service_pb2
from finemesh.datasets.v1 import dataset_service_pb2
from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from finemesh.tuning.v1 import tuning_limits_pb2, tuning_secrets_pb2
from services.scheduler.spec.integrations import ProvidedSecrets
from services.scheduler.spec.outlook import Outlook
from services.scheduler.spec.tuning_limits import BaseFacts, Limits
from services.scheduler.spec.tuning_methods import METHODS, SUPERVISED, Method, name_of
from services.scheduler.spec.tuning_spec import (
    ALL_LINEAR,
    LEARNING_RATE_MAX,
    LORA_ALPHA_MAX,
    LORA_DROPOUT_MAX,
    EarlyStopping,
    HubStart,
    Hyperparameters,
    Integrations,
    Lora,
    Schedule,
    TrainOnInputs,
    TuningSpec,
    Violation,
    Wandb,
)

_TRAIN_ON_INPUTS = {
    tuning.TRAIN_ON_INPUTS_UNSPECIFIED: TrainOnInputs.AUTO,
    tuning.TRAIN_ON_INPUTS_AUTO: TrainOnInputs.AUTO,
    tuning.TRAIN_ON_INPUTS_TRUE: TrainOnInputs.TRUE,
    tuning.TRAIN_ON_INPUTS_FALSE: TrainOnInputs.FALSE,
}
_SCHEDULES = {
    tuning.LEARNING_RATE_SCHEDULE_UNSPECIFIED: Schedule.COSINE,
    tuning.LEARNING_RATE_SCHEDULE_COSINE: Schedule.COSINE,
    tuning.LEARNING_RATE_SCHEDULE_LINEAR: Schedule.LINEAR,
}


def spec_from_proto(message: tuning.TuningSpec) -> TuningSpec:
    """What was asked for; an enum value that this release does not know becomes None."""
    return TuningSpec(
        base_model=message.base_model,
        training_file=message.training_file,
        validation_file=message.validation_file,
        output_name=message.output_name,
        train_on_inputs=train_on_inputs_from_proto(message.supervised.train_on_inputs),
        method=_method_from_proto(message),
        lora=None if message.HasField("full") else _lora_from_proto(message.lora),
        weights_given=message.WhichOneof("weights") is not None,
        hyperparameters=_hyperparameters_from_proto(message.hyperparameters),
        gpu_count=message.gpu_count,
        from_checkpoint=message.from_checkpoint,
        from_hub=HubStart(repository=message.from_hub.repository, revision=message.from_hub.revision)
        if message.HasField("from_hub")
        else None,
        integrations=_integrations_from_proto(message.integrations),
    )


def spec_to_proto(spec: TuningSpec) -> tuning.TuningSpec:
    """A complete spec as it is stored, shown and trained."""
    message = tuning.TuningSpec(
        base_model=spec.base_model,
        training_file=spec.training_file,
        validation_file=spec.validation_file,
        output_name=spec.output_name,
        hyperparameters=_hyperparameters_to_proto(spec.hyperparameters),
        gpu_count=spec.gpu_count,
        from_checkpoint=spec.from_checkpoint,
    )
    if spec.from_hub is not None:
        message.from_hub.CopyFrom(tuning.HubStart(**vars(spec.from_hub)))
    if spec.integrations.wandb is not None:
        message.integrations.wandb.CopyFrom(tuning.WandbRun(**vars(spec.integrations.wandb)))
    if spec.integrations.hub_repository is not None:
        message.integrations.hub_push.repository = spec.integrations.hub_repository
    if spec.method is None:
        message.supervised.train_on_inputs = _train_on_inputs_to_proto(spec)
    else:
        settings = getattr(message, name_of(spec.method))
        settings.CopyFrom(type(settings)(**vars(spec.method)))
    if spec.lora is None:
        message.full.SetInParent()
    else:
        message.lora.CopyFrom(
            tuning.LoraTraining(
                rank=spec.lora.rank,
                alpha=spec.lora.alpha,
                dropout=spec.lora.dropout,
                target_modules=spec.lora.target_modules,
            )
        )
    return message


def train_on_inputs_from_proto(value: tuning.TrainOnInputs.ValueType) -> TrainOnInputs | None:
    """None for a value that this release does not know."""
    return _TRAIN_ON_INPUTS.get(value)


def _lora_from_proto(message: tuning.LoraTraining) -> Lora:
    return Lora(
        rank=message.rank,
        alpha=message.alpha,
        dropout=message.dropout,
        target_modules=tuple(message.target_modules),
    )


def _method_from_proto(message: tuning.TuningSpec) -> Method | None:
    """None is supervised tuning. The settings of a method have the contract's names."""
    name: str = message.WhichOneof("method") or SUPERVISED
    if name not in METHODS:
        return None
    given = getattr(message, name)
    return METHODS[name](**{setting.name: getattr(given, setting.name) for setting in fields(METHODS[name])})


def _integrations_from_proto(message: tuning.Integrations) -> Integrations:
    wandb = None
    if message.HasField("wandb"):
        wandb = Wandb(
            base_url=message.wandb.base_url,
            project=message.wandb.project,
            entity=message.wandb.entity,
            run_name=message.wandb.run_name,
        )
    return Integrations(
        wandb=wandb, hub_repository=message.hub_push.repository if message.HasField("hub_push") else None
    )


def hub_start_to_proto(start: HubStart) -> node_pb2.StartWeights:
    return node_pb2.StartWeights(hub=tuning.HubStart(**vars(start)))


def secrets_from_proto(message: tuning_secrets_pb2.TuningSecrets) -> ProvidedSecrets:
    return ProvidedSecrets(wandb_api_key=message.wandb_api_key, hub_token=message.hub_token)


def _early_stopping_from_proto(message: tuning.EarlyStopping) -> EarlyStopping:
    return EarlyStopping(
        patience=message.patience,
        min_delta=message.min_delta,
        warmup_evaluations=message.warmup_evaluations if message.HasField("warmup_evaluations") else None,
    )


def _hyperparameters_from_proto(message: tuning.Hyperparameters) -> Hyperparameters:
    return Hyperparameters(
        epochs=message.epochs,
        evaluations=message.evaluations,
        batch_size=message.batch_size,
        learning_rate=message.learning_rate,
        warmup_ratio=message.warmup_ratio,
        schedule=_SCHEDULES.get(message.learning_rate_schedule),
        min_learning_rate_ratio=message.min_learning_rate_ratio,
        weight_decay=message.weight_decay,
        gradient_norm_max=message.gradient_norm_max if message.HasField("gradient_norm_max") else None,
        sequence_tokens_max=message.sequence_tokens_max,
        seed=message.seed if message.HasField("seed") else None,
        checkpoint_interval_steps=message.checkpoint_interval_steps,
        cycle_count=message.cycle_count,
        gradient_accumulation_steps=message.gradient_accumulation_steps,
        packing=message.packing if message.HasField("packing") else None,
        checkpoints=message.checkpoints,
        batch_size_max=message.batch_size_max,
        early_stopping=_early_stopping_from_proto(message.early_stopping)
        if message.HasField("early_stopping")
        else None,
    )


def _hyperparameters_to_proto(given: Hyperparameters) -> tuning.Hyperparameters:
    schedule = (
        tuning.LEARNING_RATE_SCHEDULE_LINEAR
        if given.schedule is Schedule.LINEAR
        else tuning.LEARNING_RATE_SCHEDULE_COSINE
    )
    stopping = given.early_stopping
    return tuning.Hyperparameters(
        epochs=given.epochs,
        evaluations=given.evaluations,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        warmup_ratio=given.warmup_ratio,
        learning_rate_schedule=schedule,
        min_learning_rate_ratio=given.min_learning_rate_ratio,
        weight_decay=given.weight_decay,
        gradient_norm_max=given.gradient_norm_max,
        sequence_tokens_max=given.sequence_tokens_max,
        seed=given.seed,
        checkpoint_interval_steps=given.checkpoint_interval_steps,
        cycle_count=given.cycle_count,
        gradient_accumulation_steps=given.gradient_accumulation_steps,
        packing=given.packing,
        checkpoints=given.checkpoints,
        batch_size_max=given.batch_size_max,
        early_stopping=None if stopping is None else tuning.EarlyStopping(**vars(stopping)),
    )


def _train_on_inputs_to_proto(spec: TuningSpec) -> tuning.TrainOnInputs.ValueType:
    match spec.train_on_inputs:
        case TrainOnInputs.TRUE:
            return tuning.TRAIN_ON_INPUTS_TRUE
        case TrainOnInputs.FALSE:
            return tuning.TRAIN_ON_INPUTS_FALSE
        case _:
            return tuning.TRAIN_ON_INPUTS_AUTO


def base_facts_from_proto(base: model_artifact_service_pb2.ResolveBaseModelResponse) -> BaseFacts:
    return BaseFacts(
        context_tokens_max=base.context_tokens_max,
        adapter_rank_max=base.adapter_rank_max,
        parameter_count=base.parameter_count,
    )


def limits_to_proto(
    base_model: str, limits: Limits, template: dataset_service_pb2.DescribeModelResponse | None
) -> tuning_limits_pb2.TuningLimits:
    """`template` is None while nothing is known of it."""
    message = tuning_limits_pb2.TuningLimits(
        base_model=base_model,
        epochs_max=limits.epochs_max,
        evaluations_max=limits.evaluations_max,
        checkpoints_max=limits.checkpoints_max,
        learning_rate_min=0.0,
        learning_rate_max=LEARNING_RATE_MAX,
        sequence_tokens_min=limits.sequence_tokens_min,
        sequence_tokens_max_supervised=limits.sequence_tokens_max,
        sequence_tokens_max_dpo=limits.sequence_tokens_max_dpo,
        gradient_accumulation_steps_max=limits.gradient_accumulation_steps_max,
        gradient_accumulation_steps_default=1,
        supports_dpo=limits.batch_dpo > 0,
    )
    if template is not None:
        message.supports_tools = template.supports_tools
        message.supports_reasoning = template.supports_reasoning
    if limits.lora_rank_max and limits.batch_lora:
        message.lora.CopyFrom(
            tuning_limits_pb2.LoraLimits(
                rank_default=limits.lora_rank_default,
                rank_max=limits.lora_rank_max,
                alpha_max=LORA_ALPHA_MAX,
                dropout_max=LORA_DROPOUT_MAX,
                target_modules=[ALL_LINEAR],
                batch=_batch_to_proto(limits, lora=True),
            )
        )
    if limits.batch_full:
        message.full.CopyFrom(tuning_limits_pb2.FullLimits(batch=_batch_to_proto(limits, lora=False)))
    return message


def _batch_to_proto(limits: Limits, *, lora: bool) -> tuning_limits_pb2.BatchLimits:
    return tuning_limits_pb2.BatchLimits(
        min=1, max_supervised=limits.batch_max(lora=lora, dpo=False), max_dpo=limits.batch_max(lora=lora, dpo=True)
    )


def outlook_to_proto(outlook: Outlook) -> tuning.RunOutlook:
    return tuning.RunOutlook(
        sequence_count=outlook.sequence_count,
        steps_per_epoch=outlook.steps_per_epoch,
        step_count=outlook.step_count,
        warnings=[tuning.SettingWarning(**vars(warning)) for warning in outlook.warnings],
    )


def violations_to_errors(violations: Sequence[Violation]) -> list[FieldViolation]:
    return [FieldViolation(violation.field, violation.description) for violation in violations]
