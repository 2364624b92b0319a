"""Writes of a stream of answers, with an eye on whether the client takes them. It knows no method. Not pure: gRPC."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from chassis.errors import DeadlineExceeded, DomainError


class WatchedWrites:
    """Stands for gRPC's context. A write that lasts longer than `stalled_s_max` makes `tell` end the call.

    One timer a stream, and none while nothing is written: a stream has many small writes.
    """

    def __init__(self, inner: Any, stalled_s_max: float, tell: Callable[[DomainError], None]) -> None:
        self._inner = inner
        self._stalled_s_max = stalled_s_max
        self._tell = tell
        self._first: asyncio.Task[None] | None = None
        self._began_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, message: Any) -> None:
        self._began_s = time.monotonic()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._stalled_s_max, self._look)
        if self._first is None:
            # It carries the head of the answer, and no status can be sent in its middle: see `head_sent`.
            self._first = asyncio.ensure_future(self._inner.write(message))
            self._first.add_done_callback(_hear)
            await asyncio.shield(self._first)
        else:
            await self._inner.write(message)
        self._began_s = None

    async def head_sent(self) -> None:
        """Returns when a status can follow; cancelled, as gRPC does when the client is gone, it ends the write."""
        if self._first is None or self._first.done():
            return
        try:
            await asyncio.wait({self._first})
        except asyncio.CancelledError:
            self._first.cancel()
            raise

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._began_s is None:
            return
        left_s = self._began_s + self._stalled_s_max - time.monotonic()
        if left_s > 0:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._look)
            return
        self._tell(
            DeadlineExceeded(
                "READER_STALLED",
                f"nothing of the answer was taken for {self._stalled_s_max:g} s (stalled_reader_s_max); read faster, or"
                " ask again",
            )
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _hear(writing: asyncio.Task[None]) -> None:
    """So that an error which nobody waits for any more is not reported as forgotten."""
    if not writing.cancelled():
        writing.exception()
