"""Errors of other services: which of them end a job, which are waited out, and what a request is told of them.

An error about the user's data, settings or credit will come again and ends the job; anything else is retried.
"""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from chassis.errors import DataLoss, DomainError, FieldViolation, Internal
from services.scheduler.jobs.endings import JobFailure

Answer = TypeVar("Answer")
LINES_SHOWN_MAX = 20
MESSAGE_CHARS_MAX = 4000
RETRY_DELAY_S_FIRST = 0.25
RETRY_DELAY_S_MAX = 15.0

# Errors that say something about the request itself.
_USER_REASONS = frozenset(
    {
        "INVALID_FIELD",
        "NOT_FOUND",
        "SIZE_LIMIT",
        "DATASET_INVALID",
        "FILE_NOT_READY",
        "MODEL_UNKNOWN",
        "MODEL_INVALID",
        "BALANCE_INSUFFICIENT",
        "SPEND_CAP_EXCEEDED",
        "PRICE_UNKNOWN",
        "CONTEXT_TOO_LONG",
        "TRAINING_INPUT_INVALID",
    }
)
# Errors that no repetition mends although the user did nothing wrong.
_FINAL_REASONS = frozenset({"HOLD_EXPIRED"})


class Verdict(StrEnum):
    # The user has to change something, or nothing can be changed any more.
    REFUSE = "REFUSE"
    # The other service is away or busy: try again for as long as it takes.
    WAIT = "WAIT"
    # The other service answers, but with a defect: try again a limited number of times.
    DOUBT = "DOUBT"


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """How long to wait and what to tell meanwhile."""

    delay_s: float
    message: str


def verdict_of(error: DomainError) -> Verdict:
    if error.reason in _USER_REASONS or error.reason in _FINAL_REASONS:
        return Verdict.REFUSE
    if isinstance(error, (Internal, DataLoss)):
        return Verdict.DOUBT
    return Verdict.WAIT


def failure_of(error: DomainError) -> JobFailure:
    """The error as it ends the job: faulty lines are named in the message, at most `LINES_SHOWN_MAX` of them."""
    platform_fault = error.reason not in _USER_REASONS
    message = error.message
    if error.violations:
        omitted = int(error.metadata.get("violations_omitted", "0") or 0)
        message = f"{message}: {_in_words(error.violations, omitted)}"
    return JobFailure(
        reason=error.reason,
        message=_bounded(message),
        platform_fault=platform_fault,
        metadata=error.metadata,
    )


def waiting_of(error: DomainError, service: str, failures: int) -> Waiting:
    """`failures` counts this one too."""
    delay_s = min(RETRY_DELAY_S_FIRST * 2.0 ** min(failures - 1, 10), RETRY_DELAY_S_MAX)
    return Waiting(
        delay_s=max(delay_s, error.retry_after_s or 0.0),
        message=f"waits for {service}: {error.message} (attempt {failures})",
    )


def _in_words(violations: Sequence[FieldViolation], omitted: int) -> str:
    shown = [f"{violation.field}: {violation.description}" for violation in violations[:LINES_SHOWN_MAX]]
    rest = len(violations) - len(shown) + omitted
    return "; ".join([*shown, f"and {rest} more"] if rest else shown)


def _bounded(message: str) -> str:
    return message if len(message) <= MESSAGE_CHARS_MAX else message[: MESSAGE_CHARS_MAX - 1] + "…"


async def ask_about(field: str, call: Awaitable[Answer]) -> Answer:
    """The answer of a call. Its error names the field of the request that it is about."""
    try:
        return await call
    except DomainError as error:
        raise type(error)(
            error.reason,
            f"{field}: {error.message}",
            violations=error.violations or [FieldViolation(field, error.message)],
            metadata=error.metadata,
            retry_after_s=error.retry_after_s,
        ) from error
