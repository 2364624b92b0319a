"""Which month's invoice something belongs to: its own, or a later one when that was closed before it came. Pure.

Months are the dates of their first days, in UTC. Which months are closed is decided elsewhere, under the lock of the
organization's chain; the answer holds as long as that lock is held.
"""

from collections.abc import Collection
from datetime import UTC, date, datetime


def first_of_month(moment: datetime) -> date:
    """The first day of the month in which the moment lies."""
    moment = moment.astimezone(UTC)
    return date(moment.year, moment.month, 1)


def next_month(month: date) -> date:
    return date(month.year + month.month // 12, month.month % 12 + 1, 1)


def billing_month(moment: datetime, closed: Collection[date], now: datetime) -> date:
    """The month of the moment while its invoice is open; then the month of now, because a closed one never changes.

    A clock that is behind can see its own month closed by a process whose clock is not: then the next open one it is.
    """
    month = first_of_month(moment)
    if month not in closed:
        return month
    month = max(month, first_of_month(now))
    while month in closed:
        month = next_month(month)
    return month
