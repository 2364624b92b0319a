"""Between finemesh.tuning.v1.TuningSpec and the scheduler's own spec, both ways. It judges nothing."""

from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.scheduler.spec import Hyperparameters, Lora, Schedule, TrainOnInputs, TuningSpec

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


def spec_from(message: tuning.TuningSpec) -> TuningSpec:
    """What was asked for; an enum value that this release does not know becomes None."""
    return TuningSpec(
        base_model=message.base_model,
        training_file=message.training_file,
        validation_file=message.validation_file,
        output_name=message.output_name,
        train_on_inputs=_TRAIN_ON_INPUTS.get(message.supervised.train_on_inputs),
        lora=None if message.HasField("full") else _lora_from(message.lora),
        hyperparameters=_hyperparameters_from(message.hyperparameters),
        gpu_count=message.gpu_count,
    )


def spec_to(spec: TuningSpec) -> tuning.TuningSpec:
    """A complete spec as it is stored, shown and trained."""
    message = tuning.TuningSpec(
        base_model=spec.base_model,
        training_file=spec.training_file,
        validation_file=spec.validation_file,
        output_name=spec.output_name,
        supervised=tuning.SupervisedMethod(train_on_inputs=_train_on_inputs_to(spec)),
        hyperparameters=_hyperparameters_to(spec.hyperparameters),
        gpu_count=spec.gpu_count,
    )
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


def _lora_from(message: tuning.LoraTraining) -> Lora:
    return Lora(
        rank=message.rank,
        alpha=message.alpha,
        dropout=message.dropout,
        target_modules=tuple(message.target_modules),
    )


def _hyperparameters_from(message: tuning.Hyperparameters) -> Hyperparameters:
    return Hyperparameters(
        epochs=message.epochs,
        evaluations=message.evaluations if message.HasField("evaluations") else None,
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
    )


def _hyperparameters_to(given: Hyperparameters) -> tuning.Hyperparameters:
    schedule = (
        tuning.LEARNING_RATE_SCHEDULE_LINEAR
        if given.schedule is Schedule.LINEAR
        else tuning.LEARNING_RATE_SCHEDULE_COSINE
    )
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
    )


def _train_on_inputs_to(spec: TuningSpec) -> tuning.TrainOnInputs.ValueType:
    match spec.train_on_inputs:
        case TrainOnInputs.TRUE:
            return tuning.TRAIN_ON_INPUTS_TRUE
        case TrainOnInputs.FALSE:
            return tuning.TRAIN_ON_INPUTS_FALSE
        case _:
            return tuning.TRAIN_ON_INPUTS_AUTO
