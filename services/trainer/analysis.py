"""One dataset analysis as a child process, bounded in time, memory and answer: the code that feeds training does the counting.

It knows how to ask and how to read the answer; it never renders or tokenises in the agent.
"""

import asyncio
import contextlib
import json
import resource
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
)
from finemesh.datasets.v1 import dataset_service_pb2
from services.trainer.child import LAST_WORDS_LINES_MAX
from services.trainer.config import TrainerSettings
from services.trainer.spawn import Spawned, spawn_module

log = structlog.get_logger()

_MODEL_REASONS = frozenset({"MODEL_INVALID"})
_TRAIN_ON_INPUTS: dict[str, bool | str] = {"": "auto", "auto": "auto", "true": True, "false": False}


async def analyze(
    request: dataset_service_pb2.AnalyzeDatasetRequest, folder: Path, dataset: str, base: str, settings: TrainerSettings
) -> dataset_service_pb2.AnalyzeDatasetResponse:
    """`dataset` and `base` are paths below `folder`. What is wrong with the data comes as a DomainError with violations."""
    question = json.dumps(question_of(request, folder / dataset, folder / base, settings)).encode()
    answer = await _run(question, settings)
    return response_of(answer)


def question_of(
    request: dataset_service_pb2.AnalyzeDatasetRequest, dataset: Path, base: Path, settings: TrainerSettings
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
    )


def _refusal(answer: Mapping[str, Any]) -> DomainError:
    reason, message = str(answer["reason"]), str(answer["message"])
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
        # Set from outside before the question is sent: nothing that costs memory happens before.
        process.limit(resource.RLIMIT_AS, settings.analysis_memory_bytes_max)
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
    last_words = "\n".join(errors.decode(errors="replace").splitlines()[-LAST_WORDS_LINES_MAX:])
    log.error("analysis crashed", exit_code=exit_code, last_words=last_words)
    if "MemoryError" in last_words or "memory allocation" in last_words:
        raise _too_much(f"needs more than {settings.analysis_memory_bytes_max} bytes", "analysis_memory_bytes_max")
    raise Internal("INTERNAL", "the analysis of the dataset crashed; the trainer's log has the details")


async def _communicate(process: Spawned, question: bytes, answer_bytes_max: int) -> tuple[bytes, bytes]:
    # A process that ended before it read the question is told apart by its exit code.
    with contextlib.suppress(BrokenPipeError):
        await asyncio.to_thread(process.stdin.write, question)
        process.stdin.close()
    output, errors = await asyncio.gather(
        _read_at_most(process.stdout, answer_bytes_max), _read_at_most(process.stderr, answer_bytes_max)
    )
    return output, errors


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
