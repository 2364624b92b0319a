"""Pushes models to repositories of the Hugging Face hub and pulls weights out of them. Not pure: programs.

Each try is a program of its own, in a bounded time, and is repeated while the hub is away. It knows no job.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from chassis.backoff import Backoff
from chassis.clock import Clock
from chassis.errors import Unavailable, invalid
from services.trainer.integrations import programs

log = structlog.get_logger()

PULL_PROGRAM = "services.trainer.integrations.hub.pull"
PUSH_PROGRAM = "services.trainer.integrations.hub.push"
REVISION_DEFAULT = "main"
PULL_FIELD = "spec.from_hub"

_PAUSE_S_MIN, _PAUSE_S_MAX = 1.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Repository:
    """`endpoint` is the hub's address, which the node's operator sets. The limits hold for all tries of one call."""

    endpoint: str
    name: str
    token: str
    seconds_max: float
    attempts_max: int


@dataclass(frozen=True, kw_only=True)
class PulledWeights:
    """The commit that they are from, and the digest over their files."""

    commit: str
    sha256: str


async def pull(
    source: Repository, revision: str, folder: Path, *, kind: str, bytes_max: int, home: Path, clock: Clock
) -> PulledWeights:
    """`kind` is adapter or full; an empty `revision` is the main branch.

    Raises InvalidArgument for what is not there or does not fit, Unavailable while the hub is away.
    """
    revision = revision or REVISION_DEFAULT
    request = {"revision": revision, "folder": str(folder), "kind": kind, "bytes_max": bytes_max}
    answer = await _ask(PULL_PROGRAM, source, request, home, clock)
    if "error" not in answer:
        return PulledWeights(commit=str(answer["commit"]), sha256=str(answer["sha256"]))
    why = f"{source.name} at {revision} cannot be started from: {answer['error']}"
    if answer.get("retryable"):
        raise Unavailable("DEPENDENCY_UNAVAILABLE", why)
    raise invalid(PULL_FIELD, str(answer["error"]), message=why, reason=str(answer["reason"]))


async def push(
    target: Repository, folder: Path, names: Sequence[str], *, message: str, home: Path, clock: Clock
) -> Mapping[str, str]:
    """{"commit", "url"}, or {"error"} in words for the user. Repeating it makes no second commit."""
    request = {"folder": str(folder), "files": list(names), "message": message}
    answer = await _ask(PUSH_PROGRAM, target, request, home, clock)
    if "error" in answer:
        return {"error": str(answer["error"])}
    return {"commit": str(answer["commit"]), "url": str(answer["url"])}


async def _ask(
    module: str, repository: Repository, request: Mapping[str, Any], home: Path, clock: Clock
) -> Mapping[str, Any]:
    """The program's answer, or {"error", "retryable"} in words for the user."""
    whole = {"endpoint": repository.endpoint, "token": repository.token, "repository": repository.name, **request}
    answer: Mapping[str, Any] = {}
    backoff = Backoff(first_s=_PAUSE_S_MIN, last_s=_PAUSE_S_MAX)
    try:
        async with asyncio.timeout(repository.seconds_max):
            for attempt in range(1, repository.attempts_max + 1):
                answer = await _try(module, whole, home)
                if "error" not in answer or not answer.get("retryable") or attempt == repository.attempts_max:
                    break
                log.warning("hub_failed", module=module, repository=repository.name, error=answer["error"])
                await clock.sleep(backoff.next_s())
    except TimeoutError:
        answer = {"error": f"it took longer than {repository.seconds_max:g} s", "retryable": True}
    return answer


async def _try(module: str, request: Mapping[str, Any], home: Path) -> Mapping[str, Any]:
    async with programs.running(module, home) as program:
        try:
            await program.send(request)
            answer = await program.receive()
        except OSError:
            answer = None
    return answer or {"error": "the program that talks to the hub ended without an answer", "retryable": True}
