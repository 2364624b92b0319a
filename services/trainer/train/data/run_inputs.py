"""All that a run knows before its first step: data, schedule and identity. It holds no weights and takes no step."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from formats.prompts.answer_ends import ends_of_model
from formats.prompts.model_folder import ModelFolder
from services.trainer.train.data.packing.mismatched import mismatched_rows
from services.trainer.train.data.preparation.prepare import Dataset, DatasetRefusal, prepare_dataset
from services.trainer.train.data.schedule import RunSchedule, schedule_run
from services.trainer.train.data.tokens.base_tokenizer import models_fault, open_model_folder
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings, resolve_max_seq_length
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.data.tokens.turn_ends import turn_ends
from services.trainer.train.runtime.event_stream import Emit
from services.trainer.train.settings.failures import Violation, user_failure
from services.trainer.train.settings.methods import method_of_format
from services.trainer.train.settings.spec import Spec

# In the work folder, where no cache is named.
PREPARED = "prepared"
# Of answers that end with plain text; with fewer the data has some that are cut off.
OPEN_SHARE_MAX = 0.5


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint must share with the run that goes on from it."""

    spec_digest: str
    packing_digest: str
    base_revision: str


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that is known before the first step."""

    spec: Spec
    workdir: Path
    folder: ModelFolder
    train: Dataset
    validation: Dataset | None
    # For a method that compares them (packing/mismatched.py).
    train_mismatched: TokenRows | None = None
    validation_mismatched: TokenRows | None = None
    max_seq_length: int
    schedule: RunSchedule
    identity: Identity
    # Rows lie padded side by side on every device, because those of this model would see each other in one line.
    padded: bool = False
    # Token ids that end a trained answer; `base_ends` are those that the base model knows already.
    answer_ends: tuple[int, ...]
    base_ends: frozenset[int]

    @property
    def ends(self) -> frozenset[int]:
        """All tokens that end an answer of the trained model."""
        return self.base_ends | set(self.answer_ends)

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates at all."""
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
        directories=replace(
            spec.directories,
            scratch=spec.directories.scratch or workdir,
            cache=spec.directories.cache or workdir / PREPARED,
        ),
        report=lambda progress: emit("preparing", **asdict(progress)),
    )
    train_data = _dataset(Path(spec.train_file), "train", folder, settings, spec.method, emit)
    validation = None
    if spec.validation_file is not None:
        validation = _dataset(Path(spec.validation_file), "validation", folder, settings, spec.method, emit)
    schedule = schedule_run(
        train_data.sequences.count,
        sequences_per_step=spec.sequences_per_step,
        epochs=spec.epochs,
        evaluations=spec.evaluations,
        checkpoints=spec.checkpoints,
        checkpoint_every_steps=spec.checkpoint_every_steps,
        seed=spec.seed,
        may_end_at_evaluations=spec.early_stopping is not None,
    )
    answer_ends = _answer_ends(train_data, folder, settings, emit)
    return Inputs(
        spec=spec,
        workdir=workdir,
        folder=folder,
        train=train_data,
        validation=validation,
        train_mismatched=_mismatched(spec, train_data, settings),
        validation_mismatched=_mismatched(spec, validation, settings),
        max_seq_length=settings.max_seq_length,
        schedule=schedule,
        identity=Identity(
            spec_digest=spec.digest(),
            packing_digest=train_data.sequences.digest,
            base_revision=spec.base_model.revision,
        ),
        answer_ends=answer_ends,
        base_ends=_base_ends(Path(spec.base_model.directory), folder),
    )


def _answer_ends(train: Dataset, folder: ModelFolder, settings: PrepareSettings, emit: Emit) -> tuple[int, ...]:
    found = turn_ends(train.rows, folder.tokenizer, settings.max_seq_length)
    if found.open_share > OPEN_SHARE_MAX:
        emit(
            "warning",
            code="ANSWERS_WITHOUT_END",
            message=f"{found.open_share:.0%} of the answers of the train file end with plain text and no special "
            "token, so nothing tells an engine where the tuned model's answers end: give the chat template a token "
            "such as eos_token behind each answer, or send `stop` with every request",
        )
    return found.ids


def _base_ends(directory: Path, folder: ModelFolder) -> frozenset[int]:
    """As a server knows them: eos counts where the tokenizer names it."""
    named = folder.special_tokens.get("eos_token")
    eos_id = None if named is None else folder.tokenizer.token_to_id(named)
    with models_fault():
        return ends_of_model(directory) | (frozenset() if eos_id is None else {eos_id})


def _mismatched(spec: Spec, dataset: Dataset | None, settings: PrepareSettings) -> TokenRows | None:
    if dataset is None or spec.method_settings is None or not spec.method_settings.compares_mismatched:
        return None
    return mismatched_rows(dataset.rows, settings.max_seq_length)


def _dataset(path: Path, name: str, folder: ModelFolder, settings: PrepareSettings, method: str, emit: Emit) -> Dataset:
    dataset = prepare_dataset(path, name, folder, settings, pack_rows=name == "train")
    if isinstance(dataset, DatasetRefusal):
        violations = [
            Violation(field=f"{name} line {error.line}: {error.path}", description=f"expected {error.verdict}")
            for error in dataset.errors
        ]
        raise user_failure("DATASET_INVALID", f"the {name} file has {dataset.error_count} invalid entries", violations)
    if method_of_format(dataset.format) != method:
        raise user_failure(
            "DATASET_INVALID",
            f"the {name} file has rows of the {dataset.format} format, which the method "
            f"{method_of_format(dataset.format)} learns from; the method {method} takes others",
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
