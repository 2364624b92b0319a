"""How a job ends: what billing is told of it, and the error that the user sees. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from services.scheduler.jobs.job import Transitioned


class Ending(StrEnum):
    """How a job ended as far as money is concerned, as TuningJobEnding without the prefix."""

    COMPLETED = "COMPLETED"
    STOPPED_EARLY = "STOPPED_EARLY"
    CANCELLED_RUNNING = "CANCELLED_RUNNING"
    CANCELLED_BEFORE_RUN = "CANCELLED_BEFORE_RUN"
    PLATFORM_FAILURE = "PLATFORM_FAILURE"
    USER_FAILURE = "USER_FAILURE"
    REFUSED = "REFUSED"


@dataclass(frozen=True, kw_only=True)
class JobFailure:
    """What ends a job: `reason` is a name of ErrorReason, `message` says what happened and what to do."""

    reason: str
    message: str
    platform_fault: bool
    metadata: Mapping[str, str] = field(default_factory=dict)


def cancelled_ending(change: Transitioned) -> Ending:
    return Ending.CANCELLED_RUNNING if change.start_time is not None else Ending.CANCELLED_BEFORE_RUN


def failed_ending(change: Transitioned, failure: JobFailure) -> Ending:
    if failure.platform_fault:
        return Ending.PLATFORM_FAILURE
    return Ending.USER_FAILURE if change.start_time is not None else Ending.REFUSED
