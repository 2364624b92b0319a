"""The calls of health and reflection, which anybody may make: bounded, and never refused.

A refusal would let whoever fills the places keep out those who ask whether the server is well. So the oldest call gives
way to the next one, that of the same connection first. It knows no method and no time.
"""

from collections import OrderedDict
from collections.abc import Callable

from chassis.errors import ResourceExhausted
from chassis.rpc.call_limits import RETRY_S, Place

End = Callable[[ResourceExhausted], None]


class OpenCalls:
    """One for each server."""

    def __init__(self, *, calls_max: int, per_connection_max: int) -> None:
        self._calls_max = calls_max
        self._per_connection_max = per_connection_max
        # In the order of their coming; those in the middle leave, too.
        self._open: OrderedDict[_Opened, None] = OrderedDict()
        self._of_connection: dict[str, OrderedDict[_Opened, None]] = {}

    def enter(self, connection: str, end: End) -> Place:
        """`end` is called when this call has to give way."""
        neighbours = self._of_connection.get(connection, ())
        if len(neighbours) >= self._per_connection_max:
            self._give_way(next(iter(neighbours)), "open_calls_per_connection_max", self._per_connection_max)
        elif len(self._open) >= self._calls_max:
            self._give_way(next(iter(self._open)), "open_calls_max", self._calls_max)
        opened = _Opened(self, connection, end)
        self._open[opened] = None
        self._of_connection.setdefault(connection, OrderedDict())[opened] = None
        return opened

    def remove(self, opened: "_Opened") -> None:
        if opened not in self._open:
            return
        del self._open[opened]
        neighbours = self._of_connection[opened.connection]
        del neighbours[opened]
        if not neighbours:
            del self._of_connection[opened.connection]

    def _give_way(self, opened: "_Opened", limit: str, limit_count: int) -> None:
        self.remove(opened)
        opened.end(
            ResourceExhausted(
                "CONCURRENCY_LIMIT",
                f"this was the oldest of {limit_count} calls of health and reflection ({limit}), and gave way to a new"
                " one; ask again, and close what nobody reads",
                metadata={"limit": limit, "limit_count": str(limit_count)},
                retry_after_s=RETRY_S,
            )
        )


class _Opened:
    """A call that is known by itself."""

    __slots__ = ("_calls", "connection", "end")

    def __init__(self, calls: OpenCalls, connection: str, end: End) -> None:
        self._calls = calls
        self.connection = connection
        self.end = end

    def leave(self) -> None:
        """It counts until gRPC is done with it: its answer may not be taken."""

    def forget(self, _context: object = None) -> None:
        self._calls.remove(self)
