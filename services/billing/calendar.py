"""Months, and which month's invoice something belongs to.

It is the month of the use, or a later one when that month's invoice was closed before. Months are UTC, and their dates
are those of their first days. Which months are closed is read under the lock of the organization's chain; an answer
holds for as long as that lock is held.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime

_MONTH = re.compile(r"(20[0-9]{2})-(0[1-9]|1[0-2])")


@dataclass(frozen=True, kw_only=True)
class Month:
    """A calendar month in UTC."""

    year: int
    month: int

    @classmethod
    def of(cls, moment: datetime) -> "Month":
        moment = moment.astimezone(UTC)
        return cls(year=moment.year, month=moment.month)

    @classmethod
    def from_day(cls, day: date) -> "Month":
        return cls(year=day.year, month=day.month)

    @classmethod
    def parse(cls, text: str) -> "Month | None":
        """`2026-11`; None when it is not one."""
        found = _MONTH.fullmatch(text)
        return cls(year=int(found.group(1)), month=int(found.group(2))) if found else None

    @property
    def first_day(self) -> date:
        return date(self.year, self.month, 1)

    @property
    def start(self) -> datetime:
        return datetime(self.year, self.month, 1, tzinfo=UTC)

    @property
    def end(self) -> datetime:
        return datetime(self.year + self.month // 12, self.month % 12 + 1, 1, tzinfo=UTC)

    def __str__(self) -> str:
        return f"{self.year:04d}-{self.month:02d}"


def first_of_month(moment: datetime) -> date:
    """The first day of the month in which the moment lies."""
    moment = moment.astimezone(UTC)
    return date(moment.year, moment.month, 1)


def next_month(month: date) -> date:
    return date(month.year + month.month // 12, month.month % 12 + 1, 1)


def billing_month(moment: datetime, closed: Collection[date], now: datetime) -> date:
    """The month of the moment while its invoice is open; then the month of now, because a closed one never changes.

    A clock that is behind can find its own month closed by a process whose clock is ahead: then it is the next month
    that is open.
    """
    month = first_of_month(moment)
    if month not in closed:
        return month
    month = max(month, first_of_month(now))
    while month in closed:
        month = next_month(month)
    return month


@dataclass(frozen=True)
class OpenMonths:
    """Which months are closed, by organization.

    It is true for as long as the organizations are locked, because closing an invoice takes the same locks.
    """

    closed: Mapping[str, frozenset[date]]
    now: datetime

    def of(self, organization_id: str, moment: datetime) -> date:
        """First day of the month whose invoice has it."""
        return billing_month(moment, self.closed.get(organization_id, frozenset()), self.now)
