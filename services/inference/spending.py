"""Who may spend, as billing said last: asked by every call, so it answers from memory. Pure; it counts no money.

An organization, project or key of which nothing was heard may spend. A higher revision is a later word; an older one
changes nothing, in whatever order they come.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

EXHAUSTED = "EXHAUSTED"


@dataclass(frozen=True, kw_only=True)
class CreditWord:
    """State of an organization's credit, as in billing's CreditState without the prefix."""

    organization_id: str
    state: str
    revision: int


@dataclass(frozen=True, kw_only=True)
class CapWord:
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

    cap: CapWord


class Spending:
    """The last word on each organization, project and key."""

    def __init__(self) -> None:
        self._credit: dict[str, CreditWord] = {}
        self._caps: dict[tuple[str, str], CapWord] = {}

    def hear(self, words: Iterable[CreditWord | CapWord]) -> None:
        for word in words:
            if isinstance(word, CreditWord):
                known = self._credit.get(word.organization_id)
                if known is None or known.revision < word.revision:
                    self._credit[word.organization_id] = word
            else:
                key = (word.project_id, word.api_key_id)
                capped = self._caps.get(key)
                if capped is None or capped.revision < word.revision:
                    self._caps[key] = word

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
