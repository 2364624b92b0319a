"""The answers of an analysis as JSON objects: counts, invalid rows, or the reason of a refusal. It reads no file."""

from dataclasses import asdict
from typing import Any

from formats.prompts.model_folder import ModelFolder
from services.trainer.train.analysis.request import Question
from services.trainer.train.data.preparation.prepare import Dataset, DatasetRefusal
from services.trainer.train.data.schedule import schedule_run
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.settings.failures import Failure


def counted(
    asked: Question, folder: ModelFolder, settings: PrepareSettings, datasets: dict[str, Dataset | DatasetRefusal]
) -> dict[str, Any]:
    train, validation = datasets["train"], datasets.get("validation")
    assert isinstance(train, Dataset)
    schedule = schedule_run(
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
        "steps_per_epoch": schedule.steps_per_epoch,
        "total_steps": schedule.total_steps,
        "train_token_count": train.rows.token_count,
        "validation_token_count": validation_tokens,
        "billed_train_tokens": train.rows.token_count * asked.epochs,
        "billed_validation_tokens": validation_tokens * asked.epochs * asked.evaluations,
        "errors": [],
        "error_count": 0,
    }


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
        "unpacked_sequences": rows.count // rows.rows_per_example,
        "sequences": dataset.sequences.count,
        "sha256": dataset.sha256,
        "features": asdict(dataset.features),
        "rows_per_second": round(dataset.rows_per_second, 1),
    }


def invalid_rows(refusals: list[DatasetRefusal]) -> dict[str, Any]:
    total = sum(refusal.error_count for refusal in refusals)
    errors = [
        {"file": refusal.file, "line": error.line, "path": error.path, "expected": error.verdict}
        for refusal in refusals
        for error in refusal.errors
    ]
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


def refused(failure: Failure) -> dict[str, Any]:
    return {
        "ok": False,
        "reason": failure.reason,
        "message": failure.message,
        "errors": [],
        "error_count": 0,
        "violations": [asdict(violation) for violation in failure.violations],
    }
