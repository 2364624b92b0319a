"""The typed errors for calls that may not begin or go on: what lacks, and what the caller can do."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from chassis.errors import FailedPrecondition, Unavailable

AGAIN_RETRY_S = 1.0
NANOS_USD_PER_USD = 10**9


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why billing grants no more: `available` nano-dollars are all that it could add to a lease."""

    reason: str
    available: int
    cap_nanos_usd: int
    api_key_id: str
    until_time: datetime | None


def refusal_of(error: FailedPrecondition) -> Refusal:
    """What billing's refusal of a grant says."""
    told = error.metadata
    until = told.get("until_time")
    return Refusal(
        reason=error.reason,
        available=int(told.get("available_nanos_usd", "0")),
        cap_nanos_usd=int(told.get("cap_nanos_usd", "0")),
        api_key_id=told.get("api_key_id", ""),
        until_time=datetime.fromisoformat(until) if until else None,
    )


def refused(refusal: Refusal, *, what: str, required: int, free: int) -> FailedPrecondition:
    """The error of a call. `what` may cost up to `required`, and `free` is left of the lease that it has."""
    available = free + refusal.available
    metadata = {
        "required_nanos_usd": str(required),
        "available_nanos_usd": str(available),
        "shortfall_nanos_usd": str(required - available),
    }
    needs = f"{what} may cost up to {in_dollars(required)} USD"
    if refusal.reason != "SPEND_CAP_EXCEEDED":
        return FailedPrecondition(
            refusal.reason,
            f"{needs}, and {in_dollars(available)} USD of the organization's prepaid credit are free: add at least"
            f" {in_dollars(required - available)} USD (`finemesh billing top-up`), or allow fewer tokens",
            metadata=metadata,
        )
    whose = f"API key {refusal.api_key_id}" if refusal.api_key_id else "the project"
    wait = f", or wait until {refusal.until_time:%Y-%m-%d %H:%M} UTC" if refusal.until_time else ""
    return FailedPrecondition(
        refusal.reason,
        f"{needs}, and {whose} has {in_dollars(available)} USD left of its monthly spend cap of"
        f" {in_dollars(refusal.cap_nanos_usd)} USD: raise the cap (`finemesh billing budget set`), allow fewer"
        f" tokens{wait}",
        metadata={
            **metadata,
            "cap_nanos_usd": str(refusal.cap_nanos_usd),
            "api_key_id": refusal.api_key_id,
            **({"until_time": refusal.until_time.isoformat()} if refusal.until_time else {}),
        },
    )


def billing_away(problem: str) -> Unavailable:
    """The error of a call that billing would have to be asked about."""
    return Unavailable(
        "DEPENDENCY_UNAVAILABLE",
        f"billing has to be asked whether this call can be paid, and cannot be reached: {problem}; try again",
        retry_after_s=AGAIN_RETRY_S,
    )


def in_dollars(nanos_usd: int) -> str:
    """Exact, with at least two decimals: `5.00`, `0.0000061`."""
    whole, fraction = divmod(nanos_usd, NANOS_USD_PER_USD)
    digits = f"{fraction:09d}"
    return f"{whole}.{digits[:2]}{digits[2:].rstrip('0')}"
