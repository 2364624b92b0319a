"""All that a run knows before its first step: data, plan and identity, and how the rows of a step are laid out.

It holds no weights and takes no step.
"""

from dataclasses import dataclass
from pathlib import Path

from services.trainer.train.batches import MicroBatch, layout_for, micro_batches
from services.trainer.train.checkpoint import Identity
from services.trainer.train.events import Emit
from services.trainer.train.failures import Violation, user_failure
from services.trainer.train.plan import RunPlan, plan_run
from services.trainer.train.prepare import (
    Dataset,
    DatasetRefusal,
    PrepareSettings,
    prepare_dataset,
    resolve_max_seq_length,
)
from services.trainer.train.spec import Spec
from services.trainer.train.tokenizer import ModelFolder, open_model_folder


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


def batches_of_step(inputs: Inputs, step: int) -> tuple[list[MicroBatch], int]:
    """The micro-batches of a step and how many tokens they hold, pads not counted."""
    sequences = inputs.train.sequences
    chosen = inputs.plan.sequences_of_step(step, sequences.count)
    indices = [row for sequence in chosen.tolist() for row in sequences.groups[sequence]]
    return _batches(inputs, inputs.train, indices), int(sequences.token_counts[chosen].sum())


def validation_batches(inputs: Inputs) -> list[MicroBatch]:
    """The whole validation file; empty when nothing is evaluated."""
    if inputs.validation is None or not inputs.spec.evaluations:
        return []
    return _batches(inputs, inputs.validation, list(range(inputs.validation.rows.count)))


def _batches(inputs: Inputs, dataset: Dataset, indices: list[int]) -> list[MicroBatch]:
    spec = inputs.spec
    return micro_batches(
        dataset.rows,
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
