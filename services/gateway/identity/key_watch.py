"""Ends open streams whose key was revoked. It knows neither what a stream carries nor how it is ended."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from chassis.clock import Clock
from chassis.errors import Unauthenticated
from chassis.rounds import Signal, run_rounds

# Of some key ids, finds those that are revoked.
FindRevoked = Callable[[list[str]], Awaitable[list[str]]]


def revoked() -> Unauthenticated:
    """What is told to whoever shows a revoked key."""
    return Unauthenticated("API_KEY_REVOKED", "this API key was revoked; create another one and use that")


@dataclass(eq=False, kw_only=True)
class OpenStream:
    """A stream that its key keeps open; `end` is called once, when the key is revoked."""

    end: Callable[[], object]
    revoked: bool = False

    def check(self) -> None:
        """For a stream that cannot be ended from outside: Unauthenticated once its key is revoked."""
        if self.revoked:
            raise revoked()


class KeyWatch:
    """Looks every `pause_s`, and at once when told, for the keys of all open streams: one query for all of them."""

    def __init__(self, find_revoked: FindRevoked, clock: Clock, *, pause_s: float) -> None:
        self._find_revoked = find_revoked
        self._clock = clock
        self._pause_s = pause_s
        self._open: dict[str, set[OpenStream]] = {}
        self._told = Signal()

    def look(self) -> None:
        """After a revocation by this process."""
        self._told.send()

    @contextmanager
    def over(self, key_id: str, end: Callable[[], object] = lambda: None) -> Iterator[OpenStream]:
        """Whatever the block fails with after `end` was called is told as Unauthenticated."""
        stream = OpenStream(end=end)
        self._open.setdefault(key_id, set()).add(stream)
        try:
            yield stream
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            # A caller that went away is not there to be told.
            if stream.revoked and not (task is not None and task.cancelling()):
                raise revoked() from error
            raise
        finally:
            streams = self._open[key_id]
            streams.discard(stream)
            if not streams:
                del self._open[key_id]

    async def run(self) -> None:
        await run_rounds("key_watch", self._round, wait=lambda: self._told.wait(self._pause_s), clock=self._clock)

    async def _round(self) -> None:
        if not self._open:
            return
        for key_id in await self._find_revoked(list(self._open)):
            for stream in list(self._open.get(key_id, ())):
                if not stream.revoked:
                    stream.revoked = True
                    stream.end()
