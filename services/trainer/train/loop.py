"""The run: prepare, resume, step, evaluate, report, checkpoint, export, prove, finish.

It knows neither who started it nor who is billed; it tells its events and obeys `stopping`.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import peft
import torch
import transformers

from services.trainer.train.batches import MicroBatch, layout_for, micro_batches
from services.trainer.train.checkpoint import (
    Identity,
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
from services.trainer.train.lora import add_adapter
from services.trainer.train.model import CausalModel, load_base
from services.trainer.train.optim import learning_rate_at, make_optimizer, set_learning_rate
from services.trainer.train.parity import check_parity
from services.trainer.train.plan import RunPlan, plan_run
from services.trainer.train.position import Position
from services.trainer.train.prepare import (
    Dataset,
    DatasetRefusal,
    PrepareSettings,
    prepare_dataset,
    resolve_max_seq_length,
)
from services.trainer.train.progress import Progress, StepRecord
from services.trainer.train.spec import LoraTraining, Spec
from services.trainer.train.tokenizer import ModelFolder, open_model_folder

CODE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that is known before the first step."""

    spec: Spec
    workdir: Path
    folder: ModelFolder
    train: Dataset
    validation: Dataset | None
    max_seq_length: int
    plan: RunPlan
    identity: Identity

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    @property
    def validation_tokens(self) -> int:
        return self.validation.rows.token_count if self.validation else 0


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
        for step in range(run.position.step, inputs.plan.total_steps):
            if stopping():
                raise Stopped
            train_step(run, step)
            report_when_due(run)
            evaluate_when_due(run)
            checkpoint_when_due(run)
        revision = export_and_prove(run)
    except Stopped:
        run.progress.flush(run.position)
        emit("stopped", total_steps=inputs.plan.total_steps, **_metered(run.position))
        return
    except Failure as failure:
        if failure.kind == "user":
            # Final for the job, so the last range may end anywhere. After a failure of ours the range is done again.
            run.progress.flush(run.position)
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


def prepare_inputs(spec: Spec, workdir: Path, emit: Emit) -> Inputs:
    folder = open_model_folder(Path(spec.base_model.directory))
    settings = PrepareSettings(
        max_seq_length=resolve_max_seq_length(spec.max_seq_length, folder),
        packing=spec.packing,
        train_on_inputs=spec.train_on_inputs,
        template_date=spec.template_date,
    )
    train_data = _dataset(Path(spec.train_file), "train", folder, settings, emit)
    validation = None
    if spec.validation_file is not None:
        validation = _dataset(Path(spec.validation_file), "validation", folder, settings, emit)
    plan = plan_run(
        train_data.sequences.count,
        sequences_per_step=spec.sequences_per_step,
        epochs=spec.epochs,
        evaluations=spec.evaluations,
        checkpoints=spec.checkpoints,
        checkpoint_every_steps=spec.checkpoint_every_steps,
        seed=spec.seed,
    )
    return Inputs(
        spec=spec,
        workdir=workdir,
        folder=folder,
        train=train_data,
        validation=validation,
        max_seq_length=settings.max_seq_length,
        plan=plan,
        identity=Identity(
            spec_digest=spec.digest(),
            packing_digest=train_data.sequences.digest,
            base_revision=spec.base_model.revision,
        ),
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
    )
    if inputs.validation is not None and spec.evaluations:
        rows = inputs.validation.rows
        run.validation_batches = _batches(inputs, rows_of=inputs.validation, indices=list(range(rows.count)))
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
        lineage=_lineage(run),
    )
    return revision


def batches_of_step(inputs: Inputs, step: int) -> tuple[list[MicroBatch], int]:
    """The micro-batches of a step and how many tokens they hold, pads not counted."""
    sequences = inputs.train.sequences
    chosen = inputs.plan.sequences_of_step(step, sequences.count)
    indices = [row for sequence in chosen.tolist() for row in sequences.groups[sequence]]
    return _batches(inputs, rows_of=inputs.train, indices=indices), int(sequences.token_counts[chosen].sum())


def _batches(inputs: Inputs, *, rows_of: Dataset, indices: list[int]) -> list[MicroBatch]:
    spec = inputs.spec
    return micro_batches(
        rows_of.rows,
        indices,
        tokens_max=spec.micro_batch_tokens,
        layout=layout_for(spec.device),
        device=spec.device,
    )


def _dataset(path: Path, name: str, folder: ModelFolder, settings: PrepareSettings, emit: Emit) -> Dataset:
    dataset = prepare_dataset(path, name, folder, settings, pack_rows=name == "train")
    if isinstance(dataset, DatasetRefusal):
        violations = [
            Violation(field=f"{name} line {error.line}: {error.path}", description=f"expected {error.expected}")
            for error in dataset.errors
        ]
        raise user_failure("DATASET_INVALID", f"the {name} file has {dataset.error_count} invalid entries", violations)
    rows = dataset.rows
    if rows.truncated_rows:
        emit(
            "warning",
            code="ROWS_TRUNCATED",
            message=f"{rows.truncated_rows} rows of the {name} file are longer than {settings.max_seq_length} tokens "
            f"and lose their end; the longest has {rows.longest_row_tokens}",
        )
    if rows.skipped_rows:
        emit(
            "warning",
            code="ROWS_SKIPPED",
            message=f"{rows.skipped_rows} rows of the {name} file have no token to train on and are left out",
        )
    return dataset


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
        versions=_versions(),
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


def _lineage(run: Run) -> dict[str, Any]:
    """Where the weights come from, in digests; nothing in it depends on paths or the time of day."""
    inputs, spec = run.inputs, run.inputs.spec
    return {
        "base_model": {"id": spec.base_model.id, "revision": spec.base_model.revision},
        "train_sha256": inputs.train.sha256,
        "validation_sha256": inputs.validation.sha256 if inputs.validation else None,
        "packing_digest": inputs.train.sequences.digest,
        "tokenizer_sha256": inputs.folder.tokenizer_sha256,
        "template_sha256": inputs.folder.template_sha256,
        "spec_digest": spec.digest(),
        "spec_sha256": hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest(),
        "seed": spec.seed,
        "max_seq_length": inputs.max_seq_length,
        "code_version": CODE_VERSION,
        "versions": _versions(),
        "device": spec.device,
        "threads": spec.threads,
        **_metered(run.position),
    }


def _versions() -> dict[str, str]:
    return {module.__name__: str(module.__version__) for module in (torch, transformers, peft, numpy)}
