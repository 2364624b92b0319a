"""Converts a request for an analysis or a preview into the program's question, and its answer into a response."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chassis.errors import DomainError, FailedPrecondition, FieldViolation, InvalidArgument, Unavailable, invalid
from chassis.identity import Caller
from finemesh.datasets.v1 import dataset_service_pb2
from finemesh.files.v1 import dataset_preview_pb2, file_pb2
from services.trainer.config import TrainerSettings
from services.trainer.datasets.analysis_line import Asker, Purpose
from services.trainer.train.data.preparation.fingerprint import preparation_version

_MODEL_REASONS = frozenset({"MODEL_INVALID"})
# Not about the data: the disk of this node is full.
_NODE_REASONS = frozenset({"TRAINING_FAILED"})
_TRAIN_ON_INPUTS: dict[str, bool | str] = {"": "auto", "auto": "auto", "true": True, "false": False}


def question_from_proto(
    request: dataset_service_pb2.AnalyzeDatasetRequest | dataset_service_pb2.PreviewDatasetRequest,
    dataset: Path,
    base: Path,
    settings: TrainerSettings,
) -> dict[str, Any]:
    """InvalidArgument for a way of training on inputs that does not exist."""
    if request.train_on_inputs not in _TRAIN_ON_INPUTS:
        rule = "must be `auto`, `true` or `false`"
        raise invalid("train_on_inputs", rule)
    return {
        "base_model": {"directory": str(base)},
        "train_file": str(dataset),
        "max_seq_length": request.sequence_tokens_max or None,
        "train_on_inputs": _TRAIN_ON_INPUTS[request.train_on_inputs],
        "errors_max": settings.analysis_errors_max,
        "directories": {
            # In the folder of this analysis, which goes when it ends.
            "scratch": str(dataset.parent),
            "cache": str(settings.prepared_root.absolute()),
            "cache_bytes_max": settings.prepared_size_bytes_max,
            "workers": settings.threads_per_child,
        },
    }


def asker_from_proto(purpose: "dataset_service_pb2.AnalysisPurpose.ValueType", caller: Caller) -> Asker:
    """For whom the scheduler asks: it names organization and key of the user that it speaks for."""
    is_job = purpose == dataset_service_pb2.ANALYSIS_PURPOSE_JOB
    return Asker(purpose=Purpose.JOB if is_job else Purpose.QUOTE, organization=caller.account, key=caller.subject)


def analysis_to_proto(counted: Mapping[str, Any], *, packing_digest: str) -> dataset_service_pb2.AnalyzeDatasetResponse:
    return dataset_service_pb2.AnalyzeDatasetResponse(
        example_count=counted["rows"],
        token_count=counted["token_count"],
        labelled_token_count=counted["trained_token_count"],
        truncated_count=counted["truncated_rows"],
        longest_tokens=counted["longest_row_tokens"],
        plan_sha256=packing_digest,
        format=counted["format"],
        features=file_pb2.DatasetFeatures(**counted["features"]),
        skipped_count=counted["skipped_rows"],
        rows_per_second=counted["rows_per_second"],
        preparation_version=preparation_version(),
        row_count=counted["unpacked_sequences"],
        packed_sequence_count=counted["sequences"],
    )


def preview_to_proto(shown: Mapping[str, Any], train_on_inputs: str) -> dataset_preview_pb2.DatasetPreview:
    rows = [
        dataset_preview_pb2.PreviewRow(
            line=row["line"],
            part=row["part"],
            input_ids=row["input_ids"],
            labels=row["labels"],
            tokens=row["tokens"],
            trained_spans=[
                dataset_preview_pb2.TrainedSpan(start=start, end=end) for start, end in row["trained_spans"]
            ],
            token_count=row["token_count"],
            trained_token_count=row["trained_token_count"],
            truncated_token_count=row["truncated_token_count"],
            truncated_text=row["truncated_text"],
            weight=row["weight"],
            skipped=row["skipped"],
        )
        for row in shown["sampled"]
    ]
    return dataset_preview_pb2.DatasetPreview(
        format=file_pb2.DatasetFormat.Value(f"DATASET_FORMAT_{shown['format'].upper()}"),
        features=file_pb2.DatasetFeatures(**shown["features"]),
        row_count=shown["rows"],
        sequence_tokens_max=shown["max_seq_length"],
        train_on_inputs=train_on_inputs,
        rows=rows,
    )


def error_from_answer(answer: Mapping[str, Any]) -> DomainError:
    """A refusal, with one violation per faulty line."""
    reason, message = str(answer["reason"]), str(answer["message"])
    if reason in _NODE_REASONS:
        return Unavailable("DEPENDENCY_UNAVAILABLE", message)
    violations = [
        FieldViolation(f"line {error['line']}: {error['path']}", str(error["expected"]))
        for error in answer.get("errors") or ()
    ]
    violations += [
        FieldViolation(str(violation["field"]), str(violation["description"]))
        for violation in answer.get("violations") or ()
    ]
    kind = FailedPrecondition if reason in _MODEL_REASONS else InvalidArgument
    metadata = {"error_count": str(answer["error_count"])} if answer.get("error_count") else {}
    return kind(reason, message, violations=violations, metadata=metadata)
