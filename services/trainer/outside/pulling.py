"""The weights that a run starts from on their way out of the Hugging Face hub: typed errors, for without them there is no run."""

from dataclasses import dataclass
from pathlib import Path

from chassis.clock import Clock
from chassis.errors import FieldViolation, InvalidArgument, Unavailable
from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.trainer.outside.asking import ask

MODULE = "services.trainer.outside.pull"
REVISION_DEFAULT = "main"
FIELD = "spec.from_hub"


@dataclass(frozen=True, kw_only=True)
class Source:
    """`endpoint` is the hub's address, which the node's operator sets. `kind` is adapter or full."""

    endpoint: str
    start: tuning.HubStart
    kind: str
    bytes_max: int
    seconds_max: float
    attempts_max: int


@dataclass(frozen=True, kw_only=True)
class Pulled:
    commit: str
    sha256: str


async def pull(source: Source, token: str, folder: Path, *, home: Path, clock: Clock) -> Pulled:
    """Raises InvalidArgument for what is not there or does not fit, Unavailable while the hub is away."""
    question = {
        "endpoint": source.endpoint,
        "token": token,
        "repository": source.start.repository,
        "revision": source.start.revision or REVISION_DEFAULT,
        "folder": str(folder),
        "kind": source.kind,
        "bytes_max": source.bytes_max,
    }
    answer = await ask(
        MODULE, question, home, seconds_max=source.seconds_max, attempts_max=source.attempts_max, clock=clock
    )
    if "error" not in answer:
        return Pulled(commit=str(answer["commit"]), sha256=str(answer["sha256"]))
    why = f"{source.start.repository} at {question['revision']} cannot be started from: {answer['error']}"
    if answer.get("retryable"):
        raise Unavailable("DEPENDENCY_UNAVAILABLE", why)
    raise InvalidArgument(str(answer["reason"]), why, violations=[FieldViolation(FIELD, str(answer["error"]))])
