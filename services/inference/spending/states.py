"""Who may spend, as billing said last, answered from memory because every call asks.

An organization, project or key of which billing said nothing may spend. A higher revision is later; an older one that
comes late changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from chassis.errors import FailedPrecondition

EXHAUSTED = "EXHAUSTED"


@dataclass(frozen=True, kw_only=True)
class CreditState:
    """An organization's credit; `state` is billing's CreditState without the prefix."""

    organization_id: str
    state: str
    revision: int


@dataclass(frozen=True, kw_only=True)
class CapState:
    """Whether a project (`api_key_id` is empty) or a key reached its cap, which counts until `until_time`."""

    project_id: str
    api_key_id: str
    capped: bool
    until_time: datetime
    cap_nanos_usd: int
    revision: int


@dataclass(frozen=True, kw_only=True)
class NoCredit:
    """The organization's prepaid credit is used up."""


@dataclass(frozen=True, kw_only=True)
class Capped:
    """The cap of the project, or of the key, is reached."""

    cap: CapState


class SpendingStates:
    """The latest state of each organization, project and key."""

    def __init__(self) -> None:
        self._credit: dict[str, CreditState] = {}
        self._caps: dict[tuple[str, str], CapState] = {}

    def update(self, states: Iterable[CreditState | CapState]) -> None:
        """Takes over every state that is later than the known one."""
        for state in states:
            if isinstance(state, CreditState):
                known = self._credit.get(state.organization_id)
                if known is None or known.revision < state.revision:
                    self._credit[state.organization_id] = state
            else:
                key = (state.project_id, state.api_key_id)
                capped = self._caps.get(key)
                if capped is None or capped.revision < state.revision:
                    self._caps[key] = state

    def problem(
        self, *, organization_id: str, project_id: str, api_key_id: str, now: datetime
    ) -> NoCredit | Capped | None:
        """Why nothing more may be spent; None when it may. An empty key asks for the project alone."""
        credit = self._credit.get(organization_id)
        if credit is not None and credit.state == EXHAUSTED:
            return NoCredit()
        for key in dict.fromkeys(("", api_key_id)):
            cap = self._caps.get((project_id, key))
            if cap is not None and cap.capped and now < cap.until_time:
                return Capped(cap=cap)
        return None


def spending_error(problem: NoCredit | Capped) -> FailedPrecondition:
    """The typed error for a call that would spend."""
    if isinstance(problem, NoCredit):
        return FailedPrecondition(
            "BALANCE_INSUFFICIENT",
            "the organization's prepaid credit is used up: add credit (`finemesh billing top-up`), and calls and parked"
            " endpoints go on; `finemesh billing balance` shows what is owed",
        )
    cap = problem.cap
    whose = f"API key {cap.api_key_id}" if cap.api_key_id else "the project"
    return FailedPrecondition(
        "SPEND_CAP_EXCEEDED",
        f"{whose} reached its monthly spend cap of {cap.cap_nanos_usd / 1e9:.2f} USD: raise the cap"
        f" (`finemesh billing budget set`), or wait until {cap.until_time:%Y-%m-%d %H:%M} UTC",
        metadata={
            "cap_nanos_usd": str(cap.cap_nanos_usd),
            "api_key_id": cap.api_key_id,
            "until_time": cap.until_time.isoformat(),
        },
    )
