"""How a run begins: a fresh model, one with earlier weights, or one restored from the newest whole checkpoint.

It takes no step and knows neither evaluations nor the export.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from services.trainer.train.checkpoint.machine import differences, machine_of
from services.trainer.train.checkpoint.position import Position
from services.trainer.train.checkpoint.resume import find_checkpoint, load_checkpoint
from services.trainer.train.checkpoint.start_weights import base_directory, check_shape, load_start
from services.trainer.train.data.batches.micro_batch import layout_for
from services.trainer.train.data.run_inputs import Inputs
from services.trainer.train.disk.durable import remove_unfinished
from services.trainer.train.export.lineage import library_versions
from services.trainer.train.loop.early_stopping import restore_best
from services.trainer.train.loop.prefetch import StepBatches
from services.trainer.train.loop.progress_report import Progress
from services.trainer.train.loop.reference import (
    REFERENCE,
    TRAIN,
    TRAIN_MISMATCHED,
    VALIDATION,
    VALIDATION_MISMATCHED,
    stored_reference,
)
from services.trainer.train.loop.state import Run
from services.trainer.train.losses.objective import AdapterOff, Reference, Supervised
from services.trainer.train.losses.objective_choice import objective_of
from services.trainer.train.memory.memory_planner import Layout
from services.trainer.train.modeling.base_model import CausalModel, load_base
from services.trainer.train.modeling.fsdp import shard
from services.trainer.train.modeling.in_place_gradients import keep_gradients_in_place
from services.trainer.train.modeling.kernels import allow_tensor_cores, compile_layers, on_cuda
from services.trainer.train.modeling.lora import add_adapter
from services.trainer.train.modeling.optimizer import empty_optimizer_tensors, make_optimizer
from services.trainer.train.modeling.row_isolation import layout_that_isolates
from services.trainer.train.modeling.start_adapter import adapter_of_start
from services.trainer.train.runtime.event_stream import Emit
from services.trainer.train.runtime.process_group import ALONE, Group
from services.trainer.train.settings.failures import Violation, user_failure
from services.trainer.train.settings.methods import MethodSettings
from services.trainer.train.settings.spec import LoraTraining, Spec


def set_up_torch(spec: Spec) -> None:
    """Same threads and deterministic kernels on every attempt, or its sums would differ in the last bit."""
    torch.set_num_threads(spec.threads)
    torch.use_deterministic_algorithms(True, warn_only=spec.device != "cpu")
    # The engine writes every buffer before it reads it; filling each one first would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if spec.device != "cpu" and not torch.cuda.is_available():
        raise user_failure(
            "INVALID_FIELD",
            f"device {spec.device} is asked for, but this machine has no CUDA device",
            [Violation(field="device", description='must be "cpu" on this machine')],
        )
    if on_cuda(spec.device):
        # Events, pinned memory and some kernels go by the current device, whatever device a tensor is on.
        torch.cuda.set_device(spec.device)
    allow_tensor_cores(spec.device)


def start_run(
    inputs: Inputs,
    emit: Emit,
    stopping: Callable[[], bool],
    group: Group = ALONE,
    layout: Layout | None = None,
) -> Run:
    """A fresh model, or one restored from the newest whole checkpoint; then `started`. `layout` says how it fits into
    memory."""
    spec = inputs.spec
    torch.manual_seed(spec.seed)
    full = spec.training.type == "full"
    check_shape(spec)
    start = adapter_of_start(spec)
    model = load_base(base_directory(spec), spec.device, full=full, placed=not group.sharded)
    if isinstance(spec.training, LoraTraining):
        model = add_adapter(model, spec.training, spec.base_model.id, start)
    if spec.activation_checkpointing or (layout is not None and layout.activation_checkpointing):
        model.base.gradient_checkpointing_enable({"use_reentrant": False})
    if group.sharded:
        model = shard(model, group)
    elif full:
        keep_gradients_in_place(model.base, linear=not (spec.compile or model.autocast))
        model = replace(model, in_place=True)
    inputs = _keep_rows_apart(inputs, model, emit, group)
    if spec.compile:
        compile_layers(model.base)
        model = replace(model, kernels=(*model.kernels, "compiled"))
    load_start(model, spec, group)
    optimizer = make_optimizer(model.trainable, spec.weight_decay)
    run = Run(
        inputs=inputs,
        model=model,
        optimizer=optimizer,
        emit=emit,
        stopping=stopping,
        progress=Progress(inputs.schedule, emit, inputs.train.rows.token_count * spec.epochs, inputs.validation_tokens),
        group=group,
        position=Position(micro_batch_tokens=layout.micro_batch_tokens if layout else None),
        micro_batch_tokens=layout.micro_batch_tokens if layout else spec.micro_batch_tokens,
        evaluation_tokens=spec.micro_batch_tokens,
        batches=StepBatches(inputs, group),
        objective=Supervised(),
        validation_objective=Supervised(),
        machine=machine_of(spec, group, model),
    )
    model.module.train()
    checkpoint = _find_checkpoint(run)
    if spec.method_settings is not None:
        _learn_from_answers(run, spec.method_settings, checkpoint)
    if checkpoint is not None:
        _resume(run, checkpoint)
    else:
        # Later an update could run out of memory when half of the weights have moved.
        empty_optimizer_tensors(optimizer, model.trainable)
    _emit_started(run, checkpoint, layout)
    return run


def _keep_rows_apart(inputs: Inputs, model: CausalModel, emit: Emit, group: Group) -> Inputs:
    """The inputs with a layout in which no row sees another one. Comes before layers are compiled, which would compile
    for these few tokens. Raises Failure(user, MODEL_INVALID) when there is no such layout."""
    wanted = layout_for(inputs.spec.device)
    layout, found = layout_that_isolates(model, wanted, group)
    if layout == wanted or found is None:
        return inputs
    emit(
        "warning",
        code="ROWS_PADDED",
        message=f"{type(model.base).__name__} lets rows that are packed into one line see each other "
        f"({found.difference:.2g} nats a token): they are padded side by side instead, each as if it were alone; steps "
        "take longer, and tokens and price stay the same",
    )
    return replace(inputs, padded=True)


def _find_checkpoint(run: Run) -> Path | None:
    inputs, spec = run.inputs, run.inputs.spec

    def discard(message: str) -> None:
        run.emit("warning", code="CHECKPOINT_DISCARDED", message=message)

    inputs.checkpoints.mkdir(parents=True, exist_ok=True)
    if run.group.local_rank == 0:
        for folder in (inputs.workdir, inputs.checkpoints):
            for name in remove_unfinished(folder):
                discard(f"{name} was left unfinished")
    run.group.wait()
    if spec.resume_from:
        return Path(spec.resume_from)
    return find_checkpoint(inputs.checkpoints, inputs.identity, discard)


def _learn_from_answers(run: Run, settings: MethodSettings, checkpoint: Path | None) -> None:
    """Comes before a checkpoint's weights are put in, because the reference is what the run started from."""
    inputs = run.inputs
    references: Mapping[str, Reference] = {}
    if inputs.spec.stores_reference:
        references = stored_reference(inputs, run.model, run.group, run.emit, checkpoint)
        run.attachments[REFERENCE] = inputs.workdir / REFERENCE
    elif settings.needs_reference:
        references = dict.fromkeys((TRAIN, VALIDATION, TRAIN_MISMATCHED, VALIDATION_MISMATCHED), AdapterOff())
    run.objective = objective_of(settings, references.get(TRAIN), references.get(TRAIN_MISMATCHED))
    if inputs.validation is not None:
        run.validation_objective = objective_of(
            settings, references.get(VALIDATION), references.get(VALIDATION_MISMATCHED)
        )


def _resume(run: Run, path: Path) -> None:
    inputs, spec = run.inputs, run.inputs.spec
    run.position, machine = load_checkpoint(path, inputs.identity, run.model, run.optimizer, spec, run.group)
    _keep_micro_batches(run, run.position.micro_batch_tokens or spec.micro_batch_tokens)
    run.evaluation_tokens = run.position.evaluation_tokens or spec.micro_batch_tokens
    run.last_checkpoint_step = run.position.step
    run.progress.start_at(run.position)
    restore_best(run, path)
    other = differences(machine, run.machine)
    if other:
        run.emit(
            "warning",
            code="RESUME_NOT_EXACT",
            message=f"{path.name} was written on another machine than the one that goes on from it: "
            f"{'; '.join(other)}. The last bits of the result may differ",
        )


def _keep_micro_batches(run: Run, before: int) -> None:
    """Keeps the size of the attempt before, because another size adds in another order. A smaller one is used only
    where a smaller device leaves no choice."""
    if run.micro_batch_tokens >= before:
        run.micro_batch_tokens = before
        return
    run.position = replace(run.position, micro_batch_tokens=run.micro_batch_tokens)
    run.emit(
        "warning",
        code="RESUME_NOT_EXACT",
        message=f"this device has room for micro-batches of {run.micro_batch_tokens} tokens, and the checkpoint was "
        f"written with {before}; the last bits of the result may differ",
    )


def _emit_started(run: Run, resumed_from: Path | None, layout: Layout | None) -> None:
    inputs, spec = run.inputs, run.inputs.spec
    trainable, total = run.model.parameter_counts()
    rows = inputs.train.rows
    run.emit(
        "started",
        total_steps=inputs.schedule.total_steps,
        steps_per_epoch=inputs.schedule.steps_per_epoch,
        start_step=run.position.step,
        trained_tokens=run.position.metered_train_tokens,
        validation_loss=run.position.validation_loss,
        initial_validation_loss=run.position.initial_validation_loss,
        reward_accuracy=run.position.reward_accuracy,
        reward_margin=run.position.reward_margin,
        best_step=run.position.best_step,
        best_loss=run.position.best_loss,
        stopped_early=run.position.stopped_early,
        resumed_from=None if resumed_from is None else str(resumed_from),
        epochs=spec.epochs,
        evaluations_total=len(inputs.schedule.evaluations),
        train_token_count=rows.token_count,
        validation_token_count=inputs.validation_tokens,
        trained_token_count=rows.labelled_count,
        sequences=inputs.train.sequences.count,
        rows=rows.rows,
        truncated_rows=rows.truncated_rows,
        skipped_rows=rows.skipped_rows,
        packing_digest=inputs.train.sequences.digest,
        max_seq_length=inputs.max_seq_length,
        trainable_parameters=trainable,
        total_parameters=total,
        device=spec.device,
        threads=spec.threads,
        processes=run.group.size,
        sharded=run.group.sharded,
        micro_batch_tokens=run.micro_batch_tokens,
        predicted_peak_bytes=layout.peak_bytes if layout else None,
        versions=library_versions(),
    )
