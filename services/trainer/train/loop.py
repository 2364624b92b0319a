"""The run: prepare, resume, step, evaluate, report, checkpoint, export, prove, finish.

It knows neither who started it nor who is billed; it tells its events and obeys `stopping`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from services.trainer.train.batches import MicroBatch
from services.trainer.train.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from services.trainer.train.durable import commit_folder, remove_unfinished, revision_of
from services.trainer.train.evaluate import validation_loss
from services.trainer.train.events import Emit
from services.trainer.train.export import write_export
from services.trainer.train.failures import Failure, Stopped, Violation, user_failure
from services.trainer.train.inputs import Inputs, batches_of_step, prepare_inputs, validation_batches
from services.trainer.train.lineage import library_versions, lineage_of
from services.trainer.train.lora import add_adapter
from services.trainer.train.model import CausalModel, load_base
from services.trainer.train.optim import learning_rate_at, make_optimizer, set_learning_rate
from services.trainer.train.parity import check_parity
from services.trainer.train.position import Position
from services.trainer.train.progress import Progress, StepRecord
from services.trainer.train.spec import LoraTraining, Spec


@dataclass(kw_only=True)
class Run:
    """A run under way."""

    inputs: Inputs
    model: CausalModel
    optimizer: Any
    emit: Emit
    stopping: Callable[[], bool]
    progress: Progress
    position: Position = field(default_factory=Position)
    last_checkpoint_step: int | None = None
    validation_batches: list[MicroBatch] = field(default_factory=list)


def train(spec: Spec, workdir: Path, emit: Emit, stopping: Callable[[], bool]) -> None:
    """Runs to the end or raises Failure. When `stopping` turns true it finishes the current step and says `stopped`."""
    set_up_torch(spec)
    inputs = prepare_inputs(spec, workdir, emit)
    run = start_run(inputs, emit, stopping)
    try:
        evaluate_before_the_first_step(run)
        for step in range(run.position.step, inputs.plan.total_steps):
            if stopping():
                raise Stopped
            train_step(run, step)
            report_when_due(run)
            evaluate_when_due(run)
            checkpoint_when_due(run)
        revision = export_and_prove(run)
    except Stopped:
        run.progress.flush(run.position, partial=True)
        emit("stopped", total_steps=inputs.plan.total_steps, **_metered(run.position))
        return
    except Failure as failure:
        if failure.kind == "user":
            # Final for the job, so the last range may end anywhere. After a failure of ours the range is done again.
            run.progress.flush(run.position, partial=True)
        failure.step, failure.last_checkpoint_step = run.position.step, run.last_checkpoint_step
        raise
    emit(
        "finished",
        total_steps=inputs.plan.total_steps,
        final_loss=run.position.loss,
        validation_loss=run.position.validation_loss,
        revision=revision,
        **_metered(run.position),
    )


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


def start_run(inputs: Inputs, emit: Emit, stopping: Callable[[], bool]) -> Run:
    """A fresh model, or one restored from the newest whole checkpoint; then `started`."""
    spec = inputs.spec
    torch.manual_seed(spec.seed)
    model = load_base(Path(spec.base_model.directory), spec.device, full=spec.training.type == "full")
    if isinstance(spec.training, LoraTraining):
        model = add_adapter(model, spec.training, spec.base_model.id)
    optimizer = make_optimizer(model.trainable, spec.weight_decay)
    run = Run(
        inputs=inputs,
        model=model,
        optimizer=optimizer,
        emit=emit,
        stopping=stopping,
        progress=Progress(inputs.plan, emit, inputs.train.rows.token_count * spec.epochs, inputs.validation_tokens),
        validation_batches=validation_batches(inputs),
    )
    model.module.train()
    resumed_from = _resume(run)
    _emit_started(run, resumed_from)
    return run


def train_step(run: Run, step: int) -> None:
    """One optimizer step on the sequences that the plan names. Raises Failure(user) before a poisoned update is applied."""
    spec, plan = run.inputs.spec, run.inputs.plan
    started_s = time.monotonic()
    rate = learning_rate_at(step, plan.total_steps, spec.learning_rate, spec.warmup_ratio, spec.schedule)
    batches, tokens = batches_of_step(run.inputs, step)
    labelled = sum(batch.labelled for batch in batches)
    loss = 0.0
    for batch in batches:
        batch_loss = run.model.loss_sum(batch) / labelled
        batch_loss.backward()
        loss += batch_loss.item()
    norm = torch.nn.utils.clip_grad_norm_(run.model.trainable.values(), spec.max_grad_norm or math.inf).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _diverged(run, step, loss, norm, rate)
    set_learning_rate(run.optimizer, rate)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)

    finished = step + 1
    epoch, epoch_step = divmod(finished, plan.steps_per_epoch)
    run.position = replace(
        run.position,
        step=finished,
        epoch=epoch,
        epoch_step=epoch_step,
        metered_train_tokens=run.position.metered_train_tokens + tokens,
        loss=loss,
    )
    run.progress.add(
        StepRecord(step=finished, loss=loss, learning_rate=rate, grad_norm=norm, train_tokens=tokens),
        time.monotonic() - started_s,
    )


def report_when_due(run: Run) -> None:
    if run.position.step in run.inputs.plan.report_set:
        run.progress.flush(run.position)


def evaluate_before_the_first_step(run: Run) -> None:
    """The look that later losses are compared with, as evaluation 0. It is ours to make: no tokens are metered for it."""
    if run.position.step or not run.validation_batches:
        return
    loss = validation_loss(run.model, run.validation_batches, run.stopping)
    run.position = replace(run.position, initial_validation_loss=loss)
    run.emit("evaluation", evaluation=0, step=0, epoch=0.0, validation_tokens=0, loss=loss)


def evaluate_when_due(run: Run) -> None:
    inputs = run.inputs
    for number, at_step in inputs.plan.evaluations:
        if at_step != run.position.step or number <= run.position.evaluations_done:
            continue
        started_s = time.monotonic()
        loss = validation_loss(run.model, run.validation_batches, run.stopping)
        duration_s = time.monotonic() - started_s
        run.position = replace(
            run.position,
            evaluations_done=number,
            validation_loss=loss,
            metered_validation_tokens=run.position.metered_validation_tokens + inputs.validation_tokens,
        )
        run.progress.note_evaluation(duration_s)
        run.emit(
            "evaluation",
            evaluation=number,
            step=at_step,
            epoch=round(at_step / inputs.plan.steps_per_epoch, 4),
            validation_tokens=inputs.validation_tokens,
            loss=loss,
            duration_s=round(duration_s, 3),
        )


def checkpoint_when_due(run: Run) -> None:
    """After the report and the evaluations of its step: whoever has a checkpoint has been told everything before it."""
    inputs, position = run.inputs, run.position
    asked = inputs.plan.checkpoints.get(position.step)
    if asked is None:
        return
    saved = save_checkpoint(
        inputs.checkpoints, position, inputs.identity, run.model, run.optimizer, inputs.spec, asked=asked
    )
    run.last_checkpoint_step = position.step
    run.emit(
        "checkpoint",
        step=position.step,
        path=str(saved.path),
        files=[asdict(file) for file in saved.files],
        manifest_sha256=saved.manifest_sha256,
        asked=asked,
        loss=position.loss,
    )
    prune_checkpoints(inputs.checkpoints, inputs.spec.keep_last)


def export_and_prove(run: Run) -> str:
    """Writes the artefact and shows that it is the trained model; returns its revision."""
    if run.stopping():
        raise Stopped
    inputs, spec = run.inputs, run.inputs.spec
    target = inputs.workdir / "export"
    files = commit_folder(target, lambda folder: write_export(run.model, spec, folder), manifest=None)
    rows = inputs.validation.rows if inputs.validation else inputs.train.rows
    report = check_parity(run.model, spec, target, rows)
    revision = revision_of(files)
    run.emit(
        "exported",
        path=str(target),
        files=[asdict(file) for file in files],
        revision=revision,
        parity=asdict(report),
        lineage=lineage_of(inputs, run.position),
    )
    return revision


def _resume(run: Run) -> Path | None:
    inputs, spec = run.inputs, run.inputs.spec

    def discard(message: str) -> None:
        run.emit("warning", code="CHECKPOINT_DISCARDED", message=message)

    inputs.checkpoints.mkdir(parents=True, exist_ok=True)
    for folder in (inputs.workdir, inputs.checkpoints):
        for name in remove_unfinished(folder):
            discard(f"{name} was left unfinished")
    path = Path(spec.resume_from) if spec.resume_from else find_checkpoint(inputs.checkpoints, inputs.identity, discard)
    if path is None:
        return None
    run.position, machine = load_checkpoint(path, inputs.identity, run.model, run.optimizer, spec)
    run.last_checkpoint_step = run.position.step
    run.progress.start_at(run.position)
    if (machine["device"], machine["threads"]) != (spec.device.split(":")[0], spec.threads):
        run.emit(
            "warning",
            code="RESUME_NOT_EXACT",
            message=f"{path.name} was written on {machine['device']} with {machine['threads']} threads; "
            "on another kind of machine the last bits of the result may differ",
        )
    return path


def _emit_started(run: Run, resumed_from: Path | None) -> None:
    inputs, spec = run.inputs, run.inputs.spec
    trainable, total = run.model.parameter_counts()
    rows = inputs.train.rows
    run.emit(
        "started",
        total_steps=inputs.plan.total_steps,
        steps_per_epoch=inputs.plan.steps_per_epoch,
        start_step=run.position.step,
        trained_tokens=run.position.metered_train_tokens,
        validation_loss=run.position.validation_loss,
        initial_validation_loss=run.position.initial_validation_loss,
        resumed_from=None if resumed_from is None else str(resumed_from),
        epochs=spec.epochs,
        evaluations_total=len(inputs.plan.evaluations),
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
        versions=library_versions(),
    )


def _diverged(run: Run, step: int, loss: float, norm: float, rate: float) -> Failure:
    kept = run.last_checkpoint_step
    advice = f"the last good checkpoint is at step {kept}" if kept is not None else "there is no checkpoint yet"
    return user_failure(
        "TRAINING_INPUT_INVALID",
        f"training diverged at step {step + 1}: loss {loss}, gradient norm {norm}, learning rate {rate:.3g}; {advice}; "
        "lower the learning rate or raise the warm-up",
    )


def _metered(position: Position) -> dict[str, int]:
    return {
        "step": position.step,
        "train_tokens": position.metered_train_tokens,
        "validation_tokens": position.metered_validation_tokens,
    }
