"""Not pure: database. Keeps one connection on the channel and passes to the hub what is notified there."""

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool
from chassis.rounds import Signal, run_rounds
from services.scheduler.watching.hub import Hub
from services.scheduler.watching.store import SEPARATOR, NotificationStore

# Everything that a process may want to hear of goes through this one channel.
CHANNEL = "scheduler"
PING_INTERVAL_S = 15.0
RECONNECT_PAUSE_S = 0.05


class Listener:
    def __init__(self, pool: Pool, hub: Hub, clock: Clock) -> None:
        self._pool = pool
        self._hub = hub
        self._clock = clock

    async def run(self) -> None:
        await run_rounds("listener", self._listen, wait=self._pause, clock=self._clock)

    async def _pause(self) -> None:
        await self._clock.sleep(RECONNECT_PAUSE_S)

    async def _listen(self) -> bool:
        """Until the connection is lost."""
        async with self._pool.acquire() as connection:
            await self._pass_on(connection)
        return False

    async def _pass_on(self, connection: Connection) -> None:
        gone = Signal()

        def on_notify(_connection: object, _pid: int, _channel: str, payload: object) -> None:
            for topic in str(payload).split(SEPARATOR):
                self._hub.notify(topic)

        def on_gone(_connection: object) -> None:
            gone.send()

        connection.add_termination_listener(on_gone)
        await connection.add_listener(CHANNEL, on_notify)
        try:
            # What changed while nobody listened is unknown, so everybody looks.
            self._hub.notify_all()
            while not connection.is_closed():
                await gone.wait(PING_INTERVAL_S)
                await NotificationStore(connection).ping()
        finally:
            if not connection.is_closed():
                connection.remove_termination_listener(on_gone)
                await connection.remove_listener(CHANNEL, on_notify)
