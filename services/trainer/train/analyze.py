"""Dataset analysis: `python -m services.trainer.train.analyze`, one JSON request on stdin, one JSON answer on stdout.

Counts with the very code that feeds training (prepare.py), without torch. It knows no price.

Request: base_model.directory, train_file (required), validation_file, max_seq_length, packing, train_on_inputs, batch_size,
gradient_accumulation_steps, epochs, evaluations, template_date (as in spec.py), errors_max, place (as in place.py); with `preview` {rows, tokens_shown}
it is a question about single rows of the training file, answered by preview.py; with `describe` true it names no file and is
answered by describe.py.
Answer: `ok` and either the counts or a reason with errors (file, line, path, expected) and violations (field, description).
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.trainer.train.bounded import Reader
from services.trainer.train.data import ERRORS_MAX
from services.trainer.train.describe import describe_template
from services.trainer.train.failures import Failure, Violation, user_failure
from services.trainer.train.place import Place, read_place
from services.trainer.train.plan import plan_run
from services.trainer.train.prepare import Dataset, DatasetRefusal, prepare_dataset
from services.trainer.train.prepare_settings import PrepareSettings, Told, resolve_max_seq_length
from services.trainer.train.preview import (
    PREVIEW_ROWS_DEFAULT,
    PREVIEW_ROWS_MAX,
    PREVIEW_TOKENS_DEFAULT,
    PREVIEW_TOKENS_MAX,
    PreviewSettings,
    preview_dataset,
)
from services.trainer.train.spec import (
    MAX_SEQ_LENGTH_MAX,
    MAX_SEQ_LENGTH_MIN,
    PATH_LENGTH_MAX,
    TrainOnInputs,
    template_date,
    train_on_inputs,
)
from services.trainer.train.tokenizer import ModelFolder, open_model_folder

REQUEST_BYTES_MAX = 1024 * 1024


def main() -> int:
    answer = answer_request(sys.stdin.buffer.read(REQUEST_BYTES_MAX + 1))
    json.dump(answer, sys.stdout)
    sys.stdout.write("\n")
    return 0


def answer_request(request: bytes) -> dict[str, Any]:
    try:
        return analyze(_parse(request))
    except Failure as failure:
        return _refused(failure)


@dataclass(frozen=True, kw_only=True)
class _Question:
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
    place: Place
    shown: PreviewSettings | None


def analyze(document: Any) -> dict[str, Any]:
    """Raises Failure; broken rows are an answer, not a failure."""
    asked = _question(document)
    folder = open_model_folder(Path(asked.directory))
    if asked.describing:
        return {"ok": True, "template": asdict(describe_template(folder, asked.template_date))}
    settings = PrepareSettings(
        max_seq_length=resolve_max_seq_length(asked.max_seq_length, folder),
        packing=asked.packing,
        train_on_inputs=asked.train_on_inputs,
        template_date=asked.template_date,
        errors_max=asked.errors_max,
        place=asked.place,
        tell=_tell,
    )
    if asked.shown is not None:
        seen = preview_dataset(Path(asked.train_file), folder, settings, asked.shown)
        return _invalid([seen]) if isinstance(seen, DatasetRefusal) else {"ok": True, "preview": asdict(seen)}
    datasets = _prepare(folder, settings, asked.train_file, asked.validation_file)
    refusals = [dataset for dataset in datasets.values() if isinstance(dataset, DatasetRefusal)]
    return _invalid(refusals) if refusals else _counted(asked, folder, settings, datasets)


def _question(document: Any) -> _Question:
    violations: list[Violation] = []
    reader = Reader(document, "", violations)
    base = reader.child("base_model")
    directory = base.text("directory", PATH_LENGTH_MAX)
    base.raw("id", None), base.raw("revision", None)
    base.finish()
    describing = reader.flag("describe", False)
    asked = _Question(
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
        place=read_place(reader),
        shown=_preview(reader),
    )
    reader.finish()
    if asked.evaluations and asked.validation_file is None:
        reader.refuse("evaluations", "needs a validation_file; set it to 0 or give one")
    _raise_if(violations)
    return asked


def _counted(
    asked: _Question, folder: ModelFolder, settings: PrepareSettings, datasets: dict[str, Dataset | DatasetRefusal]
) -> dict[str, Any]:
    train, validation = datasets["train"], datasets.get("validation")
    assert isinstance(train, Dataset)
    plan = plan_run(
        train.sequences.count,
        sequences_per_step=asked.sequences_per_step,
        epochs=asked.epochs,
        evaluations=asked.evaluations,
        checkpoints=1,
        checkpoint_every_steps=None,
        seed=0,
    )
    validation_tokens = validation.rows.token_count if isinstance(validation, Dataset) else 0
    return {
        "ok": True,
        "train": _counts(train),
        "validation": _counts(validation) if isinstance(validation, Dataset) else None,
        "max_seq_length": settings.max_seq_length,
        "packing_digest": train.sequences.digest,
        "tokenizer_sha256": folder.tokenizer_sha256,
        "template_sha256": folder.template_sha256,
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": plan.total_steps,
        "train_token_count": train.rows.token_count,
        "validation_token_count": validation_tokens,
        "billed_train_tokens": train.rows.token_count * asked.epochs,
        "billed_validation_tokens": validation_tokens * asked.epochs * asked.evaluations,
        "errors": [],
        "error_count": 0,
    }


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


def _prepare(
    folder: ModelFolder, settings: PrepareSettings, train_file: str, validation_file: str | None
) -> dict[str, Dataset | DatasetRefusal]:
    datasets = {"train": prepare_dataset(Path(train_file), "train", folder, settings, pack_rows=True)}
    if validation_file is not None:
        path = Path(validation_file)
        datasets["validation"] = prepare_dataset(path, "validation", folder, settings, pack_rows=False)
    return datasets


def _tell(told: Told) -> None:
    """On standard error, for the log of whoever asked."""
    share = 100 * told.bytes_read // max(told.bytes_total, 1)
    print(
        f"{told.file} file: {told.rows} rows, {share} % of {told.bytes_total} bytes, {told.rows_per_second:.0f} rows per second",
        file=sys.stderr,
        flush=True,
    )


def _counts(dataset: Dataset) -> dict[str, Any]:
    rows = dataset.rows
    return {
        "format": dataset.format,
        "rows": rows.rows,
        "used_rows": rows.count,
        "token_count": rows.token_count,
        "trained_token_count": rows.labelled_count,
        "truncated_rows": rows.truncated_rows,
        "skipped_rows": rows.skipped_rows,
        "longest_row_tokens": rows.longest_row_tokens,
        "sequences": dataset.sequences.count,
        "sha256": dataset.sha256,
        "features": asdict(dataset.features),
        "rows_per_second": round(dataset.rows_per_second, 1),
    }


def _parse(request: bytes) -> Any:
    if len(request) > REQUEST_BYTES_MAX:
        raise user_failure("SIZE_LIMIT", f"the request is larger than {REQUEST_BYTES_MAX} bytes")
    try:
        return json.loads(request)
    except ValueError as error:
        raise user_failure("INVALID_FIELD", f"the request is not JSON: {error}") from error


def _raise_if(violations: list[Violation]) -> None:
    if violations:
        names = ", ".join(violation.field for violation in violations)
        raise user_failure("INVALID_FIELD", f"the request is invalid: {names}", violations)


def _invalid(refusals: list[DatasetRefusal]) -> dict[str, Any]:
    total = sum(refusal.error_count for refusal in refusals)
    errors = [{"file": refusal.file, **asdict(error)} for refusal in refusals for error in refusal.errors]
    first = errors[0]
    where = f"{first['file']} file, line {first['line']}: {first['path']}: expected {first['expected']}"
    return {
        "ok": False,
        "reason": "DATASET_INVALID",
        "message": f"{total} invalid {'entry' if total == 1 else 'entries'}; first: {where}",
        "errors": errors,
        "error_count": total,
        "violations": [],
    }


def _refused(failure: Failure) -> dict[str, Any]:
    return {
        "ok": False,
        "reason": failure.reason,
        "message": failure.message,
        "errors": [],
        "error_count": 0,
        "violations": [asdict(violation) for violation in failure.violations],
    }


if __name__ == "__main__":
    sys.exit(main())
