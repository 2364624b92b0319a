"""A trained model's way to the Hugging Face hub, and never more than a warning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chassis.clock import Clock
from services.trainer.outside.asking import ask
from services.trainer.transfer import StoredFile

MODULE = "services.trainer.outside.push"
FAILED = "HUB_PUSH_FAILED"


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
    answer = await ask(
        MODULE, question, home, seconds_max=target.seconds_max, attempts_max=target.attempts_max, clock=clock
    )
    if "error" in answer:
        return {"error": str(answer["error"])}
    return {"commit": str(answer["commit"]), "url": str(answer["url"])}
