"""Which minutes of an endpoint are billed: those begun while a live engine served on confirmed devices. Pure.

It knows neither the endpoint nor who asks; time is given to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True, kw_only=True)
class DueMinutes:
    """Minutes that were begun and not billed yet, one after the other."""

    begin: datetime
    count: int
    minute: timedelta

    @property
    def paid_until(self) -> datetime:
        """Where the last of them ends."""
        return self.begin + self.count * self.minute


class ServedTime:
    """How long one lease of an endpoint served, from one confirmation to the next.

    A confirmation is a renewal of the devices that succeeded while the engine lived. The time between two of them
    counts by the monotonic clock, so that a clock that is set costs nobody anything. A silence longer than
    `silence_s_max` is never billed: nobody knows what was served meanwhile.
    """

    def __init__(self, *, minute_s: float, silence_s_max: float) -> None:
        self._minute = timedelta(seconds=minute_s)
        self._silence_s_max = silence_s_max
        self._confirmed_s = -math.inf
        self._begin: datetime | None = None
        self._end: datetime | None = None

    def confirm(self, now: datetime, monotonic_s: float, paid_until: datetime | None) -> DueMinutes | None:
        """Counts up to this confirmation; what is due since `paid_until`, the end of the last billed minute."""
        since_s = monotonic_s - self._confirmed_s
        self._confirmed_s = monotonic_s
        if self._end is None or since_s > self._silence_s_max:
            # Not before the last billed minute began, where the clock was set back since.
            self._begin = self._end = now if paid_until is None else max(now, paid_until - self._minute)
        else:
            self._end += timedelta(seconds=since_s)
        assert self._begin is not None
        begin = self._begin if paid_until is None else max(self._begin, paid_until)
        if self._end < begin:
            return None
        return DueMinutes(begin=begin, count=math.floor((self._end - begin) / self._minute) + 1, minute=self._minute)
