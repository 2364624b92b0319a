"""Has the files of an import looked at by a program of its own, bounded in time and memory. Not pure: processes, os.

A stranger's tokenizer and chat template run there for the first time. It refuses to know what makes a model sound.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import structlog

from chassis.bounded_program import ProgramEnded, ProgramLimits, TookTooLong, TookTooMuch, ask_program
from chassis.errors import InvalidArgument
from chassis.spawn import harmless_environment
from services.inference.config import InferenceSettings
from services.inference.engines.checks.finding import Finding
from services.inference.models.domain import model_invalid

log = structlog.get_logger()

# By name: it is started, never imported.
PROGRAM = "services.inference.engines.checks.main"
_LOOKING = "looking at "
_ANSWER_BYTES_MAX = 1 << 20
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


async def check_files(folder: Path, settings: InferenceSettings) -> None:
    """InvalidArgument MODEL_INVALID names the file and what is wrong with it."""
    request = {
        "folder": str(folder),
        "full": settings.checks_models_fully,
        "run_bytes_max": settings.import_run_bytes_max,
        "prompts_s_max": settings.import_prompts_s_max,
    }
    found = await ask_about_files(PROGRAM, request, settings)
    if not found["ok"]:
        raise model_invalid(str(found["file"]), str(found["problem"]))
    if settings.engine == "vllm":
        await asyncio.to_thread(_check_engine, folder)
    log.info("import_checked", full=settings.checks_models_fully, ran=found["ran"])


async def ask_about_files(program: str, request: dict[str, Any], settings: InferenceSettings) -> dict[str, Any]:
    """What a program says that looks at a stranger's files; InvalidArgument MODEL_INVALID when it does not end well."""
    limits = ProgramLimits(
        seconds_max=settings.import_check_s_max,
        memory_bytes_max=settings.import_check_memory_bytes_max,
        answer_bytes_max=_ANSWER_BYTES_MAX,
    )
    seen = harmless_environment(os.environ) | _OFFLINE
    try:
        answer = await ask_program(program, json.dumps(request).encode(), limits, environment=seen, name="import_check")
    except ProgramEnded as ended:
        raise _refusal(ended, settings) from None
    found: dict[str, Any] = json.loads(answer)
    return found


def _check_engine(folder: Path) -> None:
    # Not installed where only the stub serves.
    from services.inference.engines.checks.engine_check import check_engine_takes  # noqa: PLC0415

    try:
        check_engine_takes(folder)
    except Finding as finding:
        raise model_invalid(finding.file, finding.problem) from None


def _refusal(ended: ProgramEnded, settings: InferenceSettings) -> InvalidArgument:
    looked_at = [line.removeprefix(_LOOKING) for line in ended.last_words if line.startswith(_LOOKING)]
    file = looked_at[-1] if looked_at else "files"
    if ended.exit_code == -signal.SIGALRM:
        return model_invalid(file, f"took more than {settings.import_prompts_s_max:g} s (import_prompts_s_max)")
    if isinstance(ended, TookTooLong):
        return model_invalid(file, f"took more than {settings.import_check_s_max:g} s (import_check_s_max)")
    if isinstance(ended, TookTooMuch):
        bytes_max = settings.import_check_memory_bytes_max
        return model_invalid(file, f"took more than {bytes_max} bytes of memory (import_check_memory_bytes_max)")
    return model_invalid(file, "ended the process that looked at them; the log of inference has its last words")
