"""Runs the analysis program of the training engine, bounded in time, memory and answer. Not pure: processes.

The code that feeds the training does the counting: nothing is rendered or tokenised in the agent.
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

from chassis.errors import Internal, ResourceExhausted
from finemesh.datasets.v1 import dataset_service_pb2
from services.trainer.child.spawn import LAST_WORDS_LINES_MAX, Spawned, spawn_module
from services.trainer.config import TrainerSettings
from services.trainer.datasets.convert import (
    analysis_to_proto,
    error_from_answer,
    preview_to_proto,
    question_from_proto,
)

log = structlog.get_logger()


async def preview(
    request: dataset_service_pb2.PreviewDatasetRequest, folder: Path, dataset: str, base: str, settings: TrainerSettings
) -> dataset_service_pb2.PreviewDatasetResponse:
    """As `analyze`, for single rows."""
    shown = {"rows": request.row_count_max, "tokens_shown": request.tokens_shown_max}
    document = question_from_proto(request, folder / dataset, folder / base, settings)
    # What is left at zero is left out, so that the child's defaults hold.
    document["preview"] = {name: value for name, value in shown.items() if value}
    answer = await _ask(document, settings)
    return dataset_service_pb2.PreviewDatasetResponse(
        preview=preview_to_proto(answer["preview"], request.train_on_inputs or "auto")
    )


async def describe(folder: Path, base: str, settings: TrainerSettings) -> dataset_service_pb2.DescribeModelResponse:
    """What the model's chat template can render. DomainError for a model that cannot be read."""
    question = {"base_model": {"directory": str(folder / base)}, "describe": True}
    answer = await _ask(question, settings)
    return dataset_service_pb2.DescribeModelResponse(**answer["template"])


async def analyze(
    request: dataset_service_pb2.AnalyzeDatasetRequest, folder: Path, dataset: str, base: str, settings: TrainerSettings
) -> dataset_service_pb2.AnalyzeDatasetResponse:
    """`dataset` and `base` are paths below `folder`. Faults of the data come as a DomainError with violations."""
    answer = await _ask(question_from_proto(request, folder / dataset, folder / base, settings), settings)
    counted = analysis_to_proto(answer["train"], packing_digest=answer["packing_digest"])
    log.info(
        "dataset_analysed",
        rows=counted.example_count,
        tokens=counted.token_count,
        rows_per_second=counted.rows_per_second,
    )
    return counted


async def _ask(question: Mapping[str, Any], settings: TrainerSettings) -> Mapping[str, Any]:
    """The program's answer; what it refuses comes as a DomainError."""
    answer = await _run(json.dumps(question).encode(), settings)
    if not answer["ok"]:
        raise error_from_answer(answer)
    return answer


async def _run(question: bytes, settings: TrainerSettings) -> Mapping[str, Any]:
    process = await spawn_module(
        settings.analysis_module,
        (),
        threads=settings.threads_per_child,
        gpu_uuid="",
        line_bytes_max=settings.analysis_answer_bytes_max,
    )
    try:
        # Set from outside before the question is sent: nothing that costs memory happens before. Files that are mapped
        # for reading do not count: the kernel takes their memory back when it needs it.
        process.limit(resource.RLIMIT_DATA, settings.analysis_memory_bytes_max)
        process.limit(resource.RLIMIT_CORE, 0)
        async with asyncio.timeout(settings.analysis_s_max):
            output, errors = await _communicate(process, question, settings.analysis_answer_bytes_max)
            exit_code = await process.wait()
    except TimeoutError:
        raise _too_much(f"takes longer than {settings.analysis_s_max:g} s", "analysis_s_max") from None
    finally:
        await process.end(settings.child_ending_s_max)
    if exit_code == 0:
        return _parsed(output)
    last_words = "\n".join(errors)
    log.error("analysis_crashed", exit_code=exit_code, last_words=last_words)
    if "MemoryError" in last_words or "memory allocation" in last_words:
        raise _too_much(f"needs more than {settings.analysis_memory_bytes_max} bytes", "analysis_memory_bytes_max")
    raise Internal("INTERNAL", "the analysis of the dataset crashed; the trainer's log has the details")


async def _communicate(process: Spawned, question: bytes, answer_bytes_max: int) -> tuple[bytes, list[str]]:
    # A process that ended before it read the question is told apart by its exit code.
    with contextlib.suppress(BrokenPipeError):
        await asyncio.to_thread(process.stdin.write, question)
        process.stdin.close()
    return await asyncio.gather(_read_at_most(process.stdout, answer_bytes_max), _hear_errors(process))


async def _hear_errors(process: Spawned) -> list[str]:
    """Its last words; meanwhile what it writes goes to the log, so that a long analysis can be watched."""
    last_words: deque[str] = deque(maxlen=LAST_WORDS_LINES_MAX)
    async for text in process.error_lines():
        last_words.append(text)
        log.info("analysis_output", text=text)
    return list(last_words)


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
