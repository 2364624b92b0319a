"""How many calls are open on one server: plain ones and streams apart, and of both those of each caller.

A call is counted when it is known who calls: nobody without a key or a certificate takes a place. gRPC's own limit
counts all alike, before that. It knows no method and no time.
"""

from collections import Counter
from typing import Protocol

from chassis.errors import DomainError, ResourceExhausted
from chassis.settings import ChassisSettings

RETRY_S = 1.0


class Place(Protocol):
    """What one call holds. Both may be called more than once."""

    def leave(self) -> None:
        """The server is done with the call."""

    def forget(self, _context: object = None) -> None:
        """So is gRPC: its answer is taken, or its caller is gone."""


class CallLimits:
    """One for each server.

    `subject` is the user's key; peers that speak for themselves have none, are few, and share what the server has.
    """

    def __init__(self, settings: ChassisSettings) -> None:
        calls_max, calls_per_caller_max = settings.concurrent_calls_max, settings.calls_per_caller_max
        streams_max, streams_per_caller_max = settings.streams_max, settings.streams_per_caller_max
        self._calls = Places(
            Limit(
                "concurrent_calls_max",
                calls_max,
                f"this server answers {calls_max} calls at the same time, its most (concurrent_calls_max); try again in"
                " a moment",
            ),
            Limit(
                "calls_per_caller_max",
                calls_per_caller_max,
                f"this caller has {calls_per_caller_max} calls in flight on this server, the most that one may"
                " (calls_per_caller_max); wait for some of them to end",
            ),
        )
        self._streams = Places(
            Limit(
                "streams_max",
                streams_max,
                f"this server has {streams_max} streams open, its most (streams_max); try again later, or read the"
                " state now and then instead of watching it",
            ),
            Limit(
                "streams_per_caller_max",
                streams_per_caller_max,
                f"this caller has {streams_per_caller_max} streams open on this server, the most that one may"
                " (streams_per_caller_max); close those that nobody reads, or try again when one has ended",
            ),
        )

    def take(self, subject: str, *, streams: bool) -> Place:
        return (self._streams if streams else self._calls).take(subject)


class Limit:
    """The largest number of something, and how more is refused."""

    def __init__(self, name: str, count_max: int, message: str, error: type[DomainError] = ResourceExhausted) -> None:
        self.count_max = count_max
        self._name = name
        self._message = message
        self._error = error

    def refusal(self) -> DomainError:
        return self._error(
            "CONCURRENCY_LIMIT",
            self._message,
            metadata={"limit": self._name, "limit_count": str(self.count_max)},
            retry_after_s=RETRY_S,
        )


class Places:
    """The places of one kind of calls, and each caller's part of them."""

    def __init__(self, whole: Limit, part: Limit) -> None:
        self._whole = whole
        self._part = part
        self._taken = 0
        self._taken_by: Counter[str] = Counter()

    def take(self, subject: str) -> Place:
        # The caller's own part first: who fills it has to hear of that.
        if subject and self._taken_by[subject] >= self._part.count_max:
            raise self._part.refusal()
        if self._taken >= self._whole.count_max:
            raise self._whole.refusal()
        self._taken += 1
        if subject:
            self._taken_by[subject] += 1
        return _Taken(self, subject)

    def leave(self) -> None:
        self._taken -= 1

    def forget(self, subject: str) -> None:
        self._taken_by[subject] -= 1
        if not self._taken_by[subject]:
            del self._taken_by[subject]


class _Taken:
    __slots__ = ("_places", "_subject", "_taken")

    def __init__(self, places: Places, subject: str) -> None:
        self._places = places
        self._subject = subject
        self._taken = True

    def leave(self) -> None:
        if self._taken:
            self._taken = False
            self._places.leave()

    def forget(self, _context: object = None) -> None:
        self.leave()
        if self._subject:
            subject, self._subject = self._subject, ""
            self._places.forget(subject)
