"""From files to a plan: read, render, tokenise, pack. Analysis, quote and training all come through here, so their counts
cannot disagree. It knows no torch."""

from dataclasses import dataclass
from datetime import date
from itertools import chain
from pathlib import Path

from services.trainer.train.data import ERRORS_MAX, Format, Row, RowError, RowReader
from services.trainer.train.failures import Violation, user_failure
from services.trainer.train.plan import Sequences, make_sequences
from services.trainer.train.spec import MAX_SEQ_LENGTH_DEFAULT, TrainOnInputs
from services.trainer.train.template import check_generation_prompt
from services.trainer.train.tokenizer import ModelFolder
from services.trainer.train.tokens import RowTokenizer, TokenRows


@dataclass(frozen=True, kw_only=True)
class DatasetRefusal:
    """Broken rows of one file: the first ones and how many there are."""

    file: str
    errors: tuple[RowError, ...]
    error_count: int


@dataclass(frozen=True, kw_only=True)
class Dataset:
    format: Format
    sha256: str
    rows: TokenRows
    sequences: Sequences


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    max_seq_length: int
    packing: bool
    train_on_inputs: TrainOnInputs
    template_date: str
    errors_max: int = ERRORS_MAX


def resolve_max_seq_length(asked: int | None, folder: ModelFolder) -> int:
    """Raises Failure(user, INVALID_FIELD) when more is asked for than the model can see."""
    if asked is None:
        return min(folder.context_length, MAX_SEQ_LENGTH_DEFAULT)
    if asked > folder.context_length:
        description = f"must be at most {folder.context_length}, the context of the base model, not {asked}"
        violation = Violation(field="max_seq_length", description=description)
        raise user_failure("INVALID_FIELD", f"max_seq_length {description}", [violation])
    return asked


def prepare_dataset(
    path: Path, name: str, folder: ModelFolder, settings: PrepareSettings, *, pack_rows: bool
) -> Dataset | DatasetRefusal:
    """`name` is "train" or "validation"; the latter is never packed. Raises Failure for a model that cannot be used."""
    reader = RowReader(path, settings.errors_max)
    try:
        rows = _tokenize(reader, folder, settings)
    except OSError as error:
        raise user_failure("TRAINING_INPUT_INVALID", f"the {name} file cannot be read: {error.strerror}") from error
    if reader.errors.count or reader.format is None:
        return DatasetRefusal(file=name, errors=tuple(reader.errors.kept), error_count=reader.errors.count)
    if not rows.count:
        raise user_failure(
            "TRAINING_INPUT_INVALID",
            f"no row of the {name} file has a token to train on: every answer is masked, has weight 0 or was cut off at "
            f"{settings.max_seq_length} tokens (longest row: {rows.longest_row_tokens})",
        )
    sequences = make_sequences(rows, packing=pack_rows and settings.packing, max_seq_length=settings.max_seq_length)
    return Dataset(format=reader.format, sha256=reader.sha256, rows=rows, sequences=sequences)


def _tokenize(reader: RowReader, folder: ModelFolder, settings: PrepareSettings) -> TokenRows:
    stream = iter(reader)
    first: Row | None = next(stream, None)
    template = None
    if first is not None and reader.format == "conversation":
        template = folder.chat_template(date.fromisoformat(settings.template_date))
        check_generation_prompt(template)
    tokenizer = RowTokenizer(folder, template, settings.train_on_inputs)

    rows = stream if first is None else chain([first], stream)
    return tokenizer.tokenize(rows, settings.max_seq_length, reader.errors)
