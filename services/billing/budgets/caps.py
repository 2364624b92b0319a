"""Monthly spend caps and their warnings: what a budget allows, and what has to be announced of it.

It is given what was spent; it knows no table, no event and no calendar beyond the month in hand.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from types import MappingProxyType
from typing import NamedTuple

ALERT_PERCENTS_DEFAULT = (50, 80, 100)
ALERT_PERCENTS_MAX = 10
WHOLE_CAP_PERCENT = 100


class Spender(NamedTuple):
    """A key of a project; without a key, the project."""

    project_id: str
    api_key_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The budget of a project, or of one of its keys, in one month.

    `api_key_id` is empty for the whole project, `monthly_cap_nanos_usd` 0 for a budget that was removed.
    `spent_nanos_usd` is spent and held in the month; `capped_at_nanos_usd` is the cap whose reaching was announced for
    `capped_month`, a first day, None when none was.
    """

    organization_id: str
    project_id: str
    api_key_id: str
    monthly_cap_nanos_usd: int
    alert_percents: tuple[int, ...]
    spent_nanos_usd: int
    capped_month: date | None
    capped_at_nanos_usd: int
    revision: int
    update_time: datetime

    @property
    def spender(self) -> Spender:
        """Whose budget it is."""
        return Spender(self.project_id, self.api_key_id)

    @property
    def capped(self) -> bool:
        """Whether nothing more may be spent this month."""
        return 0 < self.monthly_cap_nanos_usd <= self.spent_nanos_usd


class CapExceeded(Exception):
    """What is required does not fit under the cap of `budget`, which leaves `room_nanos_usd`."""

    def __init__(self, budget: Budget, *, required_nanos_usd: int, room_nanos_usd: int) -> None:
        super().__init__(
            f"{required_nanos_usd} nano-dollars are required, {budget.spent_nanos_usd} of"
            f" {budget.monthly_cap_nanos_usd} are spent and {room_nanos_usd} are left"
        )
        self.budget = budget
        self.required_nanos_usd = required_nanos_usd
        self.room_nanos_usd = room_nanos_usd


def room_under(budgets: Iterable[Budget], leased_nanos_usd: Mapping[Spender, int]) -> tuple[Budget, int] | None:
    """The budget that leaves the least room, and that room, which may be below zero; None without a cap.

    `leased_nanos_usd` is what calls may still use under each budget.
    """
    rooms = [
        (budget, budget.monthly_cap_nanos_usd - budget.spent_nanos_usd - leased_nanos_usd.get(budget.spender, 0))
        for budget in budgets
        if budget.monthly_cap_nanos_usd
    ]
    return min(rooms, key=lambda pair: pair[1]) if rooms else None


def check(
    budgets: Iterable[Budget],
    required_nanos_usd: int,
    leased_nanos_usd: Mapping[Spender, int] = MappingProxyType({}),
) -> None:
    """Raises CapExceeded for the budget that leaves the least room, if that is too little.

    What is leased comes back without another cap. So who lacks room even with all of it is told that.
    """
    budgets = list(budgets)
    for leased in ({}, leased_nanos_usd):
        tightest = room_under(budgets, leased)
        if tightest is not None and required_nanos_usd > tightest[1]:
            raise CapExceeded(tightest[0], required_nanos_usd=required_nanos_usd, room_nanos_usd=max(0, tightest[1]))


def percents_reached(budget: Budget) -> tuple[int, ...]:
    """The shares of the cap that are reached, rising."""
    if not budget.monthly_cap_nanos_usd:
        return ()
    return tuple(
        percent
        for percent in budget.alert_percents
        if budget.spent_nanos_usd * 100 >= budget.monthly_cap_nanos_usd * percent
    )


def cap_state_changed(budget: Budget, month: date) -> bool:
    """Whether what was announced for the month is no longer so; another cap that is reached is announced too."""
    announced_nanos_usd = budget.capped_at_nanos_usd if budget.capped_month == month else 0
    return announced_nanos_usd != (budget.monthly_cap_nanos_usd if budget.capped else 0)


def percents_problem(percents: Iterable[int]) -> str:
    """What is wrong with the shares at which a budget shall warn; empty when nothing is."""
    given = list(percents)
    if len(given) > ALERT_PERCENTS_MAX:
        return f"must be at most {ALERT_PERCENTS_MAX}"
    if any(not 1 <= percent <= 100 for percent in given):
        return "must be from 1 to 100"
    if any(later <= earlier for earlier, later in itertools.pairwise(given)):
        return "must rise"
    return ""
