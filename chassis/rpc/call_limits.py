"""How many calls are open on one server: plain ones and streams apart, and the streams of each caller.

gRPC's own limit counts all alike and refuses before anybody sees what is called, so that streams would keep out plain
calls and health checks. It knows no method and no time.
"""

import math
from collections import Counter

from chassis.errors import ResourceExhausted
from chassis.settings import ChassisSettings

RETRY_S = 1.0


class CallLimits:
    """One for each server, and one for its health and reflection, of which plain calls are not `limit_calls`. Whatever
    was taken without an error is given back once."""

    def __init__(self, settings: ChassisSettings, *, limit_calls: bool = True) -> None:
        self._calls_max = settings.concurrent_calls_max if limit_calls else math.inf
        self._streams_max = settings.streams_max
        self._streams_per_caller_max = settings.streams_per_caller_max
        self._calls = 0
        self._streams = 0
        self._streams_of: Counter[str] = Counter()

    def take_call(self) -> None:
        if self._calls >= self._calls_max:
            raise _refusal(
                "concurrent_calls_max",
                self._calls_max,
                f"this server answers {self._calls_max:.0f} calls at the same time, its most (concurrent_calls_max); "
                "try again in a moment",
            )
        self._calls += 1

    def give_call(self) -> None:
        self._calls -= 1

    def take_stream(self) -> None:
        if self._streams >= self._streams_max:
            raise _refusal(
                "streams_max",
                self._streams_max,
                f"this server has {self._streams_max} streams open, its most (streams_max); try again later, or read "
                "the state now and then instead of watching it",
            )
        self._streams += 1

    def give_stream(self) -> None:
        self._streams -= 1

    def take_stream_of(self, caller: str) -> None:
        """Besides `take_stream`, once it is known who calls."""
        if self._streams_of[caller] >= self._streams_per_caller_max:
            raise _refusal(
                "streams_per_caller_max",
                self._streams_per_caller_max,
                f"this caller has {self._streams_per_caller_max} streams open on this server, the most that one may "
                "(streams_per_caller_max); close those that nobody reads, or try again when one has ended",
            )
        self._streams_of[caller] += 1

    def give_stream_of(self, caller: str) -> None:
        self._streams_of[caller] -= 1
        if not self._streams_of[caller]:
            del self._streams_of[caller]


def _refusal(limit: str, limit_count: float, message: str) -> ResourceExhausted:
    return ResourceExhausted(
        "CONCURRENCY_LIMIT",
        message,
        metadata={"limit": limit, "limit_count": f"{limit_count:.0f}"},
        retry_after_s=RETRY_S,
    )
