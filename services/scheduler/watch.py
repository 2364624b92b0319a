"""Who wants to hear of what: bells in this process, rung by PostgreSQL's NOTIFY when any scheduler commits a change.

A bell carries no data and may be lost; whoever waits looks again by itself after a while.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool
from services.scheduler.rounds import run_rounds
from services.scheduler.store import CHANNEL, QUERIES

PING_INTERVAL_S = 15.0
RECONNECT_PAUSE_S = 0.05
log = structlog.get_logger(__name__)


class Bell:
    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Returns at the next ring, at once if one came since the last wait, or after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._rung.wait()
        except TimeoutError:
            return
        finally:
            self._rung.clear()


class Hub:
    def __init__(self) -> None:
        self._bells: dict[str, set[Bell]] = defaultdict(set)

    @contextmanager
    def listening(self, topic: str) -> Iterator[Bell]:
        bell = Bell()
        self._bells[topic].add(bell)
        try:
            yield bell
        finally:
            self._bells[topic].discard(bell)
            if not self._bells[topic]:
                del self._bells[topic]

    def ring(self, topic: str) -> None:
        for bell in self._bells.get(topic, ()):
            bell.ring()

    def ring_all(self) -> None:
        for topic in list(self._bells):
            self.ring(topic)


class Listener:
    """Keeps one connection on the channel and passes what comes to the hub."""

    def __init__(self, pool: Pool, hub: Hub, clock: Clock) -> None:
        self._pool = pool
        self._hub = hub
        self._clock = clock

    async def run(self) -> None:
        await run_rounds("listener", self._listen, self._pause, self._clock)

    async def _pause(self) -> None:
        await self._clock.sleep(RECONNECT_PAUSE_S)

    async def _listen(self) -> bool:
        """Until the connection is lost."""
        async with self._pool.acquire() as connection:
            await self._pass_on(connection)
        return False

    async def _pass_on(self, connection: Connection) -> None:
        gone = Bell()

        def on_notify(_connection: object, _pid: int, _channel: str, payload: object) -> None:
            self._hub.ring(str(payload))

        def on_gone(_connection: object) -> None:
            gone.ring()

        connection.add_termination_listener(on_gone)
        await connection.add_listener(CHANNEL, on_notify)
        try:
            # What changed while nobody listened is unknown, so everybody looks.
            self._hub.ring_all()
            while not connection.is_closed():
                await gone.wait(PING_INTERVAL_S)
                await QUERIES.ping(connection)
        finally:
            if not connection.is_closed():
                connection.remove_termination_listener(on_gone)
                await connection.remove_listener(CHANNEL, on_notify)
