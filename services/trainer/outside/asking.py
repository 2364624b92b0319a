"""A question to one of the hub programs: a program per try, a bounded time, and again while the hub is away. It knows no job."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from chassis.backoff import Backoff
from chassis.clock import Clock
from services.trainer.outside import programs

log = structlog.get_logger()

_PAUSE_S_MIN, _PAUSE_S_MAX = 1.0, 30.0


async def ask(
    module: str, question: Mapping[str, Any], home: Path, *, seconds_max: float, attempts_max: int, clock: Clock
) -> Mapping[str, Any]:
    """The program's answer, or {"error", "retryable"} in words for the user."""
    answer: Mapping[str, Any] = {}
    backoff = Backoff(first_s=_PAUSE_S_MIN, last_s=_PAUSE_S_MAX)
    try:
        async with asyncio.timeout(seconds_max):
            for attempt in range(1, attempts_max + 1):
                answer = await _try(module, question, home)
                if "error" not in answer or not answer.get("retryable") or attempt == attempts_max:
                    break
                log.warning("the hub failed", module=module, repository=question["repository"], error=answer["error"])
                await clock.sleep(backoff.next_s())
    except TimeoutError:
        answer = {"error": f"it took longer than {seconds_max:g} s", "retryable": True}
    return answer


async def _try(module: str, question: Mapping[str, Any], home: Path) -> Mapping[str, Any]:
    await asyncio.to_thread(home.mkdir, parents=True, exist_ok=True)
    process = await programs.start(module, programs.environment_of(os.environ, home))
    drain = asyncio.create_task(programs.read_away(process.stderr))
    try:
        await programs.say(process, question)
        answer = await programs.heard(process)
    except OSError:
        answer = None
    finally:
        drain.cancel()
        await programs.bury(process)
    return answer or {"error": "the program that talks to the hub ended without an answer", "retryable": True}
