"""Runs the analysis program of the training engine, bounded in time, memory and answer. Not pure: processes.

The code that feeds the training does the counting: nothing is rendered or tokenised in the agent.
"""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from chassis.bounded_program import ProgramEnded, ProgramLimits, TookTooLong, TookTooMuch, ask_program
from chassis.errors import FailedPrecondition, Internal, ResourceExhausted
from finemesh.datasets.v1 import dataset_service_pb2
from services.trainer.child.child_environment import child_environment
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
    answer = await _ask_about_rows(document, settings)
    return dataset_service_pb2.PreviewDatasetResponse(
        preview=preview_to_proto(answer["preview"], request.train_on_inputs or "auto")
    )


async def describe(folder: Path, base: str, settings: TrainerSettings) -> dataset_service_pb2.DescribeModelResponse:
    """What the model's chat template can render. DomainError for a model that cannot be read."""
    question = {"base_model": {"directory": str(folder / base)}, "describe": True}
    try:
        answer = await _ask(question, settings, settings.description_s_max)
    except TookTooLong:
        problem = f"to describe this model takes longer than {settings.description_s_max:g} s"
        raise FailedPrecondition("MODEL_INVALID", problem, metadata={"limit": "description_s_max"}) from None
    return dataset_service_pb2.DescribeModelResponse(**answer["template"])


async def analyze(
    request: dataset_service_pb2.AnalyzeDatasetRequest, folder: Path, dataset: str, base: str, settings: TrainerSettings
) -> dataset_service_pb2.AnalyzeDatasetResponse:
    """`dataset` and `base` are paths below `folder`. Faults of the data come as a DomainError with violations."""
    answer = await _ask_about_rows(question_from_proto(request, folder / dataset, folder / base, settings), settings)
    counted = analysis_to_proto(answer["train"], packing_digest=answer["packing_digest"])
    log.info(
        "dataset_analysed",
        rows=counted.example_count,
        tokens=counted.token_count,
        rows_per_second=counted.rows_per_second,
    )
    return counted


async def _ask_about_rows(question: Mapping[str, Any], settings: TrainerSettings) -> Mapping[str, Any]:
    try:
        return await _ask(question, settings, settings.analysis_s_max)
    except TookTooLong:
        raise _too_much(f"takes longer than {settings.analysis_s_max:g} s", "analysis_s_max") from None


async def _ask(question: Mapping[str, Any], settings: TrainerSettings, seconds_max: float) -> Mapping[str, Any]:
    """The program's answer; what it refuses comes as a DomainError. TookTooLong after so many seconds."""
    answer = _parsed(await _run(json.dumps(question).encode(), settings, seconds_max))
    if not answer["ok"]:
        raise error_from_answer(answer)
    return answer


async def _run(question: bytes, settings: TrainerSettings, seconds_max: float) -> bytes:
    limits = ProgramLimits(
        seconds_max=seconds_max,
        memory_bytes_max=settings.analysis_memory_bytes_max,
        answer_bytes_max=settings.analysis_answer_bytes_max,
        ending_s_max=settings.child_ending_s_max,
    )
    seen = child_environment(os.environ, threads=settings.threads_per_child, gpu_uuid="")
    try:
        return await ask_program(settings.analysis_module, question, limits, environment=seen, name="analysis")
    except TookTooLong:
        raise
    except TookTooMuch:
        problem = f"needs more than {settings.analysis_memory_bytes_max} bytes"
        raise _too_much(problem, "analysis_memory_bytes_max") from None
    except ProgramEnded as ended:
        if ended.exit_code == -signal.SIGPROF:
            # What the program does to itself when a template cannot be interrupted.
            problem = "the base model's chat template does not come to an end with one of the conversations"
            raise FailedPrecondition("MODEL_INVALID", problem) from None
        raise Internal("INTERNAL", "the analysis of the dataset crashed; the trainer's log has the details") from ended


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
