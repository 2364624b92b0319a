"""All that a run knows before its first step: data, plan and identity, and how the rows of a step are laid out.

It holds no weights and takes no step.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from services.trainer.train.batches import (
    MicroBatch,
    lay_out,
    layout_for,
    micro_batches,
    row_groups,
    row_lengths,
    without_labels,
)
from services.trainer.train.checkpoint import Identity
from services.trainer.train.distributed import ALONE, Group, deal
from services.trainer.train.events import Emit
from services.trainer.train.failures import Violation, user_failure
from services.trainer.train.plan import RunPlan, plan_run
from services.trainer.train.prepare import Dataset, DatasetRefusal, prepare_dataset
from services.trainer.train.prepare_settings import PrepareSettings, resolve_max_seq_length
from services.trainer.train.spec import Spec
from services.trainer.train.tokenizer import ModelFolder, open_model_folder
from services.trainer.train.whole_file import FileBatches

# In the work folder, where no cache is named.
SHARDS = "shards"


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
    def looks(self) -> bool:
        """Whether anything is evaluated."""
        return self.validation is not None and self.spec.evaluations > 0

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
        place=replace(spec.place, scratch=spec.place.scratch or workdir, cache=spec.place.cache or workdir / SHARDS),
        tell=lambda told: emit("preparing", **asdict(told)),
    )
    train_data = _dataset(Path(spec.train_file), "train", folder, settings, spec.method, emit)
    validation = None
    if spec.validation_file is not None:
        validation = _dataset(Path(spec.validation_file), "validation", folder, settings, spec.method, emit)
    plan = plan_run(
        train_data.sequences.count,
        sequences_per_step=spec.sequences_per_step,
        epochs=spec.epochs,
        evaluations=spec.evaluations,
        checkpoints=spec.checkpoints,
        checkpoint_every_steps=spec.checkpoint_every_steps,
        seed=spec.seed,
        may_end_at_evaluations=spec.early_stopping is not None,
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


def batches_of_step(
    inputs: Inputs, step: int, group: Group = ALONE, tokens_max: int | None = None
) -> tuple[list[MicroBatch], int]:
    """This process's micro-batches of a step, and how many tokens the whole step holds, pads not counted. `tokens_max` takes
    the place of the spec's."""
    sequences = inputs.train.sequences
    width = inputs.train.rows.rows_per_example
    chosen = inputs.plan.sequences_of_step(step, sequences.count)
    indices = [row for sequence in chosen.tolist() for row in sequences.groups[sequence][::width]]
    batches = _share(inputs, inputs.train, indices, group, tokens_max or inputs.spec.micro_batch_tokens)
    return batches, int(sequences.token_counts[chosen].sum())


def validation_batches(inputs: Inputs, group: Group = ALONE, tokens_max: int | None = None) -> FileBatches:
    """This process's part of the validation file, which there must be. `tokens_max` takes the place of the spec's."""
    assert inputs.validation is not None
    return batches_of_file(inputs, inputs.validation, group, tokens_max)


def batches_of_file(
    inputs: Inputs, dataset: Dataset, group: Group = ALONE, tokens_max: int | None = None
) -> FileBatches:
    """This process's part of all rows of a file."""
    spec = inputs.spec
    return FileBatches(
        dataset.rows,
        tokens_max=tokens_max or spec.micro_batch_tokens,
        layout=layout_for(spec.device),
        device=spec.device,
        group=group,
    )


def idle_batch(inputs: Inputs, batches: list[MicroBatch]) -> MicroBatch:
    """The least of some micro-batches of the training file, with nothing to learn."""
    rows, width = inputs.train.rows, inputs.train.rows.rows_per_example
    lengths = row_lengths(rows, [row for batch in batches for row in batch.rows[::width]], width)
    shortest = min(lengths, key=lambda index: lengths[index])
    layout = layout_for(inputs.spec.device)
    return without_labels(lay_out(rows, [shortest], layout=layout, device=inputs.spec.device, width=width))


def _share(inputs: Inputs, dataset: Dataset, indices: list[int], group: Group, tokens_max: int) -> list[MicroBatch]:
    """The rows that fall to this process, as micro-batches. All processes get equally many: those that are done early compute
    without labels what the others wait for, since sharded weights are gathered by all at once."""
    layout, device = layout_for(inputs.spec.device), inputs.spec.device
    rows, width = dataset.rows, dataset.rows.rows_per_example

    def lay(share: list[int]) -> list[MicroBatch]:
        return micro_batches(rows, share, tokens_max=tokens_max, layout=layout, device=device, width=width)

    if group.size == 1:
        return lay(indices)
    lengths = row_lengths(rows, indices, width)
    shares = deal(lengths, group.size)
    counts = [len(row_groups(rows, share, tokens_max=tokens_max, layout=layout, width=width)) for share in shares]
    batches = lay(shares[group.rank])
    missing = max(counts) - len(batches)
    if missing:
        (idle,) = lay([min(indices, key=lambda index: lengths[index])])
        batches += [without_labels(idle)] * missing
    return batches


def _dataset(path: Path, name: str, folder: ModelFolder, settings: PrepareSettings, method: str, emit: Emit) -> Dataset:
    dataset = prepare_dataset(path, name, folder, settings, pack_rows=name == "train")
    if isinstance(dataset, DatasetRefusal):
        violations = [
            Violation(field=f"{name} line {error.line}: {error.path}", description=f"expected {error.expected}")
            for error in dataset.errors
        ]
        raise user_failure("DATASET_INVALID", f"the {name} file has {dataset.error_count} invalid entries", violations)
    if (dataset.format == "preference") != (method == "dpo"):
        wanted = "rows of preferences" if method == "dpo" else "no preferences, which the method dpo learns from"
        raise user_failure(
            "DATASET_INVALID",
            f"the {name} file has rows of the {dataset.format} format, and the method {method} takes {wanted}",
        )
    rows = dataset.rows
    if rows.truncated_rows:
        emit(
            "warning",
            code="ROWS_TRUNCATED",
            message=f"{rows.truncated_rows} rows of the {name} file are longer than {settings.max_seq_length} tokens "
            f"and lose their end, the first in line {rows.truncated_line}; the longest has {rows.longest_row_tokens}",
        )
    if rows.skipped_rows:
        emit(
            "warning",
            code="ROWS_SKIPPED",
            message=f"{rows.skipped_rows} rows of the {name} file have no token to train on and are left out, "
            f"the first in line {rows.skipped_line}",
        )
    return dataset
