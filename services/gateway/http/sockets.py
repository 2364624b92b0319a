"""Which HTTP connections are open, and which of them wait for a header: both bounded, the wait also in time.

When the last place is taken, the connection that has waited longest gives way to the next: who has something to ask has
asked it by then. It knows no bytes.
"""

import asyncio
from collections import Counter, OrderedDict
from typing import Protocol

from chassis.clock import Clock
from chassis.errors import Unavailable
from services.gateway.config import GatewaySettings

RETRY_S = 1


class Waiting(Protocol):
    """An open connection."""

    def give_up(self) -> None:
        """No header came within its time, or another connection needs the place."""


class Sockets:
    """One for the HTTP edge."""

    def __init__(self, settings: GatewaySettings, clock: Clock) -> None:
        self._sockets_max = settings.http_sockets_max
        self._per_address_max = settings.http_sockets_per_address_max
        self._header_s_max = settings.http_header_s_max
        self._clock = clock
        self._address_of: dict[Waiting, str] = {}
        self._open_from: Counter[str] = Counter()
        # Since when each has waited, in that order.
        self._waiting: OrderedDict[Waiting, float] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def open(self, connection: Waiting, address: str) -> None:
        """Takes a place, waiting; Unavailable where there is none."""
        per_address_max = self._per_address_max
        if per_address_max is not None and self._open_from[address] >= per_address_max:
            raise _full("http_sockets_per_address_max", per_address_max)
        if len(self._address_of) >= self._sockets_max:
            longest = next(iter(self._waiting), None)
            if longest is None:
                raise _full("http_sockets_max", self._sockets_max)
            self._end(longest)
        self._address_of[connection] = address
        self._open_from[address] += 1
        self.wait(connection)

    def wait(self, connection: Waiting) -> None:
        """From now on a header has to come."""
        if connection in self._address_of:
            self._waiting[connection] = self._clock.monotonic()
            self._waiting.move_to_end(connection)
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._header_s_max, self._look)

    def begin(self, connection: Waiting) -> None:
        """Its header is here."""
        self._waiting.pop(connection, None)

    def close(self, connection: Waiting) -> None:
        address = self._address_of.pop(connection, None)
        if address is None:
            return
        self._waiting.pop(connection, None)
        self._open_from[address] -= 1
        if not self._open_from[address]:
            del self._open_from[address]

    def _end(self, connection: Waiting) -> None:
        self.close(connection)
        connection.give_up()

    def _look(self) -> None:
        """One timer for all, which comes again when the next one is due."""
        self._timer = None
        now_s = self._clock.monotonic()
        for connection, since_s in list(self._waiting.items()):
            left_s = since_s + self._header_s_max - now_s
            if left_s > 0:
                self._timer = asyncio.get_running_loop().call_later(left_s, self._look)
                return
            self._end(connection)


def _full(limit: str, limit_count: int) -> Unavailable:
    return Unavailable(
        "CONCURRENCY_LIMIT",
        f"{limit_count} connections are open, the most here ({limit}); close some, or try again in a moment",
        metadata={"limit": limit, "limit_count": str(limit_count)},
        retry_after_s=RETRY_S,
    )
