"""Starts the bus again when it takes no events although its disk has room.

nats-server stops writing to a stream at its first failed write, as on a full disk, and goes on only after a start. It
is not started while the disk is full: a server that cannot write what it reads at its start gives streams up. What
tells is the health of the services that publish; this module knows no stream and sends no event.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2

from chassis.backoff import Backoff
from chassis.bus import PUBLISHING_HEALTH
from deploy.local.supervisor import Supervised

LOOK_INTERVAL_S = 2.0
# Between two starts of the bus; longer and longer when they do not help, as on a disk too small for the streams.
PAUSE_S_FIRST = 15.0
PAUSE_S_LAST = 1800.0

Ask = Callable[[str], Awaitable[int]]


class BusWatch:
    """Each of `asks` gives the status of one service's part of that name, as `health_of` does."""

    def __init__(
        self,
        bus: Supervised,
        asks: Sequence[Ask],
        *,
        has_room: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._asks = asks
        self._has_room = has_room
        self._tell = tell

    async def run(self) -> None:
        pauses, clock, not_before_s = (
            Backoff(first_s=PAUSE_S_FIRST, last_s=PAUSE_S_LAST),
            asyncio.get_running_loop(),
            0.0,
        )
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            has_room = self._has_room()
            if not has_room or not any(await asyncio.gather(*(_is_kept_from_publishing(ask) for ask in self._asks))):
                # What was tried before says nothing about a bus that gets its room back.
                pauses.reset()
                not_before_s = 0.0
            elif self._bus.healthy.is_set() and clock.time() >= not_before_s:
                self._tell(f"{self._bus.name} takes no events and is started again")
                await self._bus.restart()
                not_before_s = clock.time() + pauses.next_s()


async def _is_kept_from_publishing(ask: Ask) -> bool:
    """A service that is stopping says NOT_SERVING of all its parts, and is asked for all of it last."""
    answer = health_pb2.HealthCheckResponse
    try:
        return bool(await ask(PUBLISHING_HEALTH) == answer.NOT_SERVING and await ask("") == answer.SERVING)
    except grpc.aio.AioRpcError:
        # It publishes nothing, or is away.
        return False
