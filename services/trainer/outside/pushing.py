"""A trained model's way to the Hugging Face hub: a program per try, a bounded time, and never more than a warning."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from chassis.backoff import Backoff
from chassis.clock import Clock
from services.trainer.outside import programs
from services.trainer.transfer import StoredFile

log = structlog.get_logger()

MODULE = "services.trainer.outside.push"
FAILED = "HUB_PUSH_FAILED"
_PAUSE_S_MIN, _PAUSE_S_MAX = 1.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """`endpoint` is the hub's address, which the node's operator sets."""

    endpoint: str
    repository: str
    seconds_max: float
    attempts_max: int


async def push(
    target: Target, token: str, folder: Path, files: Sequence[StoredFile], *, message: str, home: Path, clock: Clock
) -> Mapping[str, str]:
    """{"commit", "url"}, or {"error"} in words for the user. Repeating it makes no second commit."""
    question = {
        "endpoint": target.endpoint,
        "token": token,
        "repository": target.repository,
        "folder": str(folder),
        "files": [file.path for file in files],
        "message": message,
    }
    answer: Mapping[str, Any] = {}
    backoff = Backoff(first_s=_PAUSE_S_MIN, last_s=_PAUSE_S_MAX)
    try:
        async with asyncio.timeout(target.seconds_max):
            for attempt in range(1, target.attempts_max + 1):
                answer = await _try(question, home)
                if "error" not in answer or not answer.get("retryable") or attempt == target.attempts_max:
                    break
                log.warning("push to the hub failed", repository=target.repository, error=answer["error"])
                await clock.sleep(backoff.next_s())
    except TimeoutError:
        answer = {"error": f"it took longer than {target.seconds_max:g} s"}
    if "error" in answer:
        return {"error": str(answer["error"])}
    return {"commit": str(answer["commit"]), "url": str(answer["url"])}


async def _try(question: Mapping[str, Any], home: Path) -> Mapping[str, Any]:
    await asyncio.to_thread(home.mkdir, parents=True, exist_ok=True)
    process = await programs.start(MODULE, programs.environment_of(os.environ, home))
    drain = asyncio.create_task(programs.read_away(process.stderr))
    try:
        await programs.say(process, question)
        answer = await programs.heard(process)
    except OSError:
        answer = None
    finally:
        drain.cancel()
        await programs.bury(process)
    return answer or {"error": "the program that pushes ended without an answer", "retryable": True}
