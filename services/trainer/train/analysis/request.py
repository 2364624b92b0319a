"""Reads the request of an analysis and reports every broken field at once. It opens no file."""

import json
from dataclasses import dataclass
from typing import Any

from formats.row_errors import ERRORS_MAX
from services.trainer.train.analysis.row_preview import (
    PREVIEW_ROWS_DEFAULT,
    PREVIEW_ROWS_MAX,
    PREVIEW_TOKENS_DEFAULT,
    PREVIEW_TOKENS_MAX,
    PreviewSettings,
)
from services.trainer.train.settings.directories import Directories, read_directories
from services.trainer.train.settings.failures import Violation, user_failure
from services.trainer.train.settings.json_reader import Reader
from services.trainer.train.settings.limits import MAX_SEQ_LENGTH_MAX, MAX_SEQ_LENGTH_MIN, PATH_LENGTH_MAX
from services.trainer.train.settings.spec import TrainOnInputs
from services.trainer.train.settings.spec_json import template_date, train_on_inputs

REQUEST_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request that was checked. `train_file` is empty where only the template is asked about."""

    directory: str
    describing: bool
    train_file: str
    validation_file: str | None
    max_seq_length: int | None
    packing: bool
    train_on_inputs: TrainOnInputs
    template_date: str
    sequences_per_step: int
    epochs: int
    evaluations: int
    errors_max: int
    directories: Directories
    shown: PreviewSettings | None


def read_question(document: Any) -> Question:
    violations: list[Violation] = []
    reader = Reader(document, "", violations)
    base = reader.child("base_model")
    directory = base.text("directory", PATH_LENGTH_MAX)
    base.raw("id", None), base.raw("revision", None)
    base.finish()
    describing = reader.flag("describe", False)
    asked = Question(
        directory=directory,
        describing=describing,
        train_file="" if describing else reader.text("train_file", PATH_LENGTH_MAX),
        validation_file=reader.optional_text("validation_file", PATH_LENGTH_MAX),
        max_seq_length=reader.optional_integer("max_seq_length", MAX_SEQ_LENGTH_MIN, MAX_SEQ_LENGTH_MAX),
        packing=reader.flag("packing", True),
        train_on_inputs=train_on_inputs(reader),
        template_date=template_date(reader),
        sequences_per_step=reader.integer("batch_size", 1, 1024, 8)
        * reader.integer("gradient_accumulation_steps", 1, 256, 1),
        epochs=reader.integer("epochs", 1, 100, 1),
        evaluations=reader.integer("evaluations", 0, 100, 0),
        errors_max=reader.integer("errors_max", 1, 10_000, ERRORS_MAX),
        directories=read_directories(reader),
        shown=_preview(reader),
    )
    reader.finish()
    if asked.evaluations and asked.validation_file is None:
        reader.refuse("evaluations", "needs a validation_file; set it to 0 or give one")
    _raise_if(violations)
    return asked


def _preview(reader: Reader) -> PreviewSettings | None:
    if reader.raw("preview", None) is None:
        return None
    asked = reader.child("preview")
    shown = PreviewSettings(
        rows_max=asked.integer("rows", 1, PREVIEW_ROWS_MAX, PREVIEW_ROWS_DEFAULT),
        tokens_max=asked.integer("tokens_shown", 1, PREVIEW_TOKENS_MAX, PREVIEW_TOKENS_DEFAULT),
    )
    asked.finish()
    return shown


def parse_request(request: bytes) -> Any:
    if len(request) > REQUEST_BYTES_MAX:
        raise user_failure("SIZE_LIMIT", f"the request is larger than {REQUEST_BYTES_MAX} bytes")
    try:
        return json.loads(request)
    except (ValueError, RecursionError) as error:
        raise user_failure("INVALID_FIELD", "the request is not JSON") from error


def _raise_if(violations: list[Violation]) -> None:
    if violations:
        names = ", ".join(violation.field for violation in violations)
        raise user_failure("INVALID_FIELD", f"the request is invalid: {names}", violations)
