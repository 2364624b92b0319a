"""Answers questions about a dataset: `python -m services.trainer.train.analysis.main`, JSON in, JSON out.

It counts with the code that feeds training (data/preparation/prepare.py), without torch. It knows no price.

A request on standard input has base_model.directory and train_file (required), validation_file, max_seq_length,
packing, train_on_inputs, batch_size, gradient_accumulation_steps, epochs, evaluations, template_date (as in
settings/spec_json.py), errors_max and directories (as in settings/directories.py). With `preview` {rows, tokens_shown}
it asks for single rows of the training file, which row_preview.py answers. With `describe` true it names no file and is
answered by template_support.py.

The answer on standard output has `ok` and either the counts or a reason with errors (file, line, path, expected) and
violations (field, description).
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from formats.prompts.model_folder import ModelFolder
from formats.prompts.round_trip import check_round_trip
from services.trainer.train.analysis.answer import counted, invalid_rows, refused
from services.trainer.train.analysis.request import REQUEST_BYTES_MAX, parse_request, read_question
from services.trainer.train.analysis.row_preview import (
    preview_dataset,
)
from services.trainer.train.analysis.template_support import describe_template
from services.trainer.train.data.preparation.prepare import Dataset, DatasetRefusal, prepare_dataset
from services.trainer.train.data.tokens.base_tokenizer import models_fault, open_model_folder
from services.trainer.train.data.tokens.prepare_settings import (
    PreparationProgress,
    PrepareSettings,
    resolve_max_seq_length,
)
from services.trainer.train.settings.failures import Failure


def main() -> int:
    answer = answer_request(sys.stdin.buffer.read(REQUEST_BYTES_MAX + 1))
    json.dump(answer, sys.stdout)
    sys.stdout.write("\n")
    return 0


def answer_request(request: bytes) -> dict[str, Any]:
    try:
        return analyze(parse_request(request))
    except Failure as failure:
        return refused(failure)


def analyze(document: Any) -> dict[str, Any]:
    """Raises Failure; broken rows are an answer, not a failure."""
    asked = read_question(document)
    folder = open_model_folder(Path(asked.directory))
    with models_fault():
        # An older import may not have been looked at for this.
        check_round_trip(folder.tokenizer, folder.vocabulary_size)
    if asked.describing:
        return {"ok": True, "template": asdict(describe_template(folder, asked.template_date))}
    settings = PrepareSettings(
        max_seq_length=resolve_max_seq_length(asked.max_seq_length, folder),
        packing=asked.packing,
        train_on_inputs=asked.train_on_inputs,
        template_date=asked.template_date,
        errors_max=asked.errors_max,
        directories=asked.directories,
        report=_report,
    )
    if asked.shown is not None:
        seen = preview_dataset(Path(asked.train_file), folder, settings, asked.shown)
        return invalid_rows([seen]) if isinstance(seen, DatasetRefusal) else {"ok": True, "preview": asdict(seen)}
    datasets = _prepare(folder, settings, asked.train_file, asked.validation_file)
    refusals = [dataset for dataset in datasets.values() if isinstance(dataset, DatasetRefusal)]
    return invalid_rows(refusals) if refusals else counted(asked, folder, settings, datasets)


def _prepare(
    folder: ModelFolder, settings: PrepareSettings, train_file: str, validation_file: str | None
) -> dict[str, Dataset | DatasetRefusal]:
    datasets = {"train": prepare_dataset(Path(train_file), "train", folder, settings, pack_rows=True)}
    if validation_file is not None:
        path = Path(validation_file)
        datasets["validation"] = prepare_dataset(path, "validation", folder, settings, pack_rows=False)
    return datasets


def _report(progress: PreparationProgress) -> None:
    """On standard error, for the log of the caller."""
    share = 100 * progress.bytes_read // max(progress.bytes_total, 1)
    print(
        f"{progress.file} file: {progress.rows} rows, {share} % of {progress.bytes_total} bytes, "
        f"{progress.rows_per_second:.0f} rows per second",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
