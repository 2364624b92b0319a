"""One dataset analysis as a child process, bounded in time, memory and answer: the code that feeds training does the counting.

It knows how to ask and how to read the answer; it never renders or tokenises in the agent.
"""

import asyncio
import contextlib
import json
import resource
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from chassis.errors import (
    DomainError,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from finemesh.datasets.v1 import dataset_service_pb2
from finemesh.files.v1 import dataset_preview_pb2, file_pb2
from services.trainer.child import LAST_WORDS_LINES_MAX, LOG_LINE_CHARS_MAX
from services.trainer.config import TrainerSettings
from services.trainer.spawn import Spawned, spawn_module
from services.trainer.train.data.preparation.fingerprint import preparation_version

log = structlog.get_logger()

_FORMATS = {
    "conversation": file_pb2.DATASET_FORMAT_CONVERSATION,
    "instruction": file_pb2.DATASET_FORMAT_INSTRUCTION,
    "text": file_pb2.DATASET_FORMAT_TEXT,
    "preference": file_pb2.DATASET_FORMAT_PREFERENCE,
    "tokens": file_pb2.DATASET_FORMAT_TOKENS,
}
_MODEL_REASONS = frozenset({"MODEL_INVALID"})
# What says nothing about the data: the disk of this node is full.
_NODE_REASONS = frozenset({"TRAINING_FAILED"})
_TRAIN_ON_INPUTS: dict[str, bool | str] = {"": "auto", "auto": "auto", "true": True, "false": False}


async def preview(
    request: dataset_service_pb2.PreviewDatasetRequest, folder: Path, dataset: str, base: str, settings: TrainerSettings
) -> dataset_service_pb2.PreviewDatasetResponse:
    """As `analyze`, for single rows."""
    shown = {"rows": request.row_count_max, "tokens_shown": request.tokens_shown_max}
    document = question_of(request, folder / dataset, folder / base, settings)
    # What is left at zero is left out, so that the child's defaults hold.
    document["preview"] = {name: value for name, value in shown.items() if value}
    answer = await _run(json.dumps(document).encode(), settings)
    if not answer["ok"]:
        raise _refusal(answer)
    return dataset_service_pb2.PreviewDatasetResponse(
        preview=preview_message(answer["preview"], request.train_on_inputs or "auto")
    )


async def describe(folder: Path, base: str, settings: TrainerSettings) -> dataset_service_pb2.DescribeModelResponse:
    """What the model's chat template can render. DomainError for a model that cannot be read."""
    question = {"base_model": {"directory": str(folder / base)}, "describe": True}
    answer = await _run(json.dumps(question).encode(), settings)
    if not answer["ok"]:
        raise _refusal(answer)
    return dataset_service_pb2.DescribeModelResponse(**answer["template"])


async def analyze(
    request: dataset_service_pb2.AnalyzeDatasetRequest, folder: Path, dataset: str, base: str, settings: TrainerSettings
) -> dataset_service_pb2.AnalyzeDatasetResponse:
    """`dataset` and `base` are paths below `folder`. What is wrong with the data comes as a DomainError with violations."""
    question = json.dumps(question_of(request, folder / dataset, folder / base, settings)).encode()
    answer = await _run(question, settings)
    counted = response_of(answer)
    log.info(
        "dataset analysed",
        rows=counted.example_count,
        tokens=counted.token_count,
        rows_per_second=counted.rows_per_second,
    )
    return counted


def question_of(
    request: dataset_service_pb2.AnalyzeDatasetRequest | dataset_service_pb2.PreviewDatasetRequest,
    dataset: Path,
    base: Path,
    settings: TrainerSettings,
) -> dict[str, Any]:
    """InvalidArgument for a way of training on inputs that does not exist."""
    if request.train_on_inputs not in _TRAIN_ON_INPUTS:
        rule = "must be `auto`, `true` or `false`"
        raise InvalidArgument(
            "INVALID_FIELD", f"train_on_inputs {rule}", violations=[FieldViolation("train_on_inputs", rule)]
        )
    return {
        "base_model": {"directory": str(base)},
        "train_file": str(dataset),
        "max_seq_length": request.sequence_tokens_max or None,
        "train_on_inputs": _TRAIN_ON_INPUTS[request.train_on_inputs],
        "errors_max": settings.analysis_errors_max,
        "place": {
            # In the folder of this analysis, which goes when it ends.
            "scratch": str(dataset.parent),
            "cache": str(settings.prepared_root.absolute()),
            "cache_bytes_max": settings.prepared_size_bytes_max,
            "workers": settings.threads_per_child,
        },
    }


def response_of(answer: Mapping[str, Any]) -> dataset_service_pb2.AnalyzeDatasetResponse:
    """The counts, or the refusal as a DomainError with one violation per faulty line."""
    if not answer["ok"]:
        raise _refusal(answer)
    counted = answer["train"]
    return dataset_service_pb2.AnalyzeDatasetResponse(
        example_count=counted["rows"],
        token_count=counted["token_count"],
        labelled_token_count=counted["trained_token_count"],
        truncated_count=counted["truncated_rows"],
        longest_tokens=counted["longest_row_tokens"],
        plan_sha256=answer["packing_digest"],
        format=counted["format"],
        features=file_pb2.DatasetFeatures(**counted["features"]),
        skipped_count=counted["skipped_rows"],
        rows_per_second=counted["rows_per_second"],
        preparation_version=preparation_version(),
    )


def preview_message(shown: Mapping[str, Any], train_on_inputs: str) -> dataset_preview_pb2.DatasetPreview:
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
        format=_FORMATS[shown["format"]],
        features=file_pb2.DatasetFeatures(**shown["features"]),
        row_count=shown["rows"],
        sequence_tokens_max=shown["max_seq_length"],
        train_on_inputs=train_on_inputs,
        rows=rows,
    )


def _refusal(answer: Mapping[str, Any]) -> DomainError:
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


async def _run(question: bytes, settings: TrainerSettings) -> Mapping[str, Any]:
    process = await spawn_module(
        settings.analysis_module,
        (),
        threads=settings.threads_per_child,
        gpu_uuid="",
        line_bytes_max=settings.analysis_answer_bytes_max,
    )
    try:
        # Set from outside before the question is sent: nothing that costs memory happens before. Files that are mapped to be read
        # do not count: the kernel takes them back at will.
        process.limit(resource.RLIMIT_DATA, settings.analysis_memory_bytes_max)
        process.limit(resource.RLIMIT_CORE, 0)
        async with asyncio.timeout(settings.analysis_s_max):
            output, errors = await _communicate(process, question, settings.analysis_answer_bytes_max)
            exit_code = await process.wait()
    except TimeoutError:
        raise _too_much(f"takes longer than {settings.analysis_s_max:g} s", "analysis_s_max") from None
    finally:
        process.kill()
        await process.wait()
        process.close()
    if exit_code == 0:
        return _parsed(output)
    last_words = "\n".join(errors)
    log.error("analysis crashed", exit_code=exit_code, last_words=last_words)
    if "MemoryError" in last_words or "memory allocation" in last_words:
        raise _too_much(f"needs more than {settings.analysis_memory_bytes_max} bytes", "analysis_memory_bytes_max")
    raise Internal("INTERNAL", "the analysis of the dataset crashed; the trainer's log has the details")


async def _communicate(process: Spawned, question: bytes, answer_bytes_max: int) -> tuple[bytes, list[str]]:
    # A process that ended before it read the question is told apart by its exit code.
    with contextlib.suppress(BrokenPipeError):
        await asyncio.to_thread(process.stdin.write, question)
        process.stdin.close()
    return await asyncio.gather(_read_at_most(process.stdout, answer_bytes_max), _listen(process.stderr))


async def _listen(stream: asyncio.StreamReader) -> list[str]:
    """Its last words; meanwhile what it tells goes to the log, so that a long analysis can be watched."""
    last_words: deque[str] = deque(maxlen=LAST_WORDS_LINES_MAX)
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            # Over the limit: the reader dropped it and goes on.
            continue
        if not line:
            return list(last_words)
        text = line.decode(errors="replace").rstrip()[:LOG_LINE_CHARS_MAX]
        if text:
            last_words.append(text)
            log.info("analysis", text=text)


async def _read_at_most(stream: asyncio.StreamReader, bytes_max: int) -> bytes:
    """All of `stream`; what goes beyond the limit is read and dropped, so that the writer can end."""
    kept = bytearray()
    while chunk := await stream.read(64 * 1024):
        kept += chunk[: bytes_max - len(kept)]
    return bytes(kept)


def _parsed(output: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(output)
    except ValueError as error:
        raise Internal("INTERNAL", "the analysis of the dataset gave no readable answer") from error
    if not isinstance(answer, dict):
        raise Internal("INTERNAL", "the analysis of the dataset gave no readable answer")
    return answer


def _too_much(what: str, limit: str) -> ResourceExhausted:
    return ResourceExhausted("SIZE_LIMIT", f"the analysis of this dataset {what}; split it", metadata={"limit": limit})
