"""Keeps one process alive: starts it after what it needs, waits for its health, starts it again when it dies.

A process that keeps dying fails the stack: a person has to read its log.
"""

import asyncio
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from chassis.backoff import Backoff
from deploy.local.child import Child, Command
from deploy.local.process_output import Output

RESTARTS_MAX = 20
RESTARTS_WINDOW_S = 120.0
# Before it was healthy once, a process that dies is misconfigured rather than unlucky.
FIRST_ATTEMPTS_MAX = 3
RESTART_DELAY_S_MIN = 0.1
RESTART_DELAY_S_MAX = 5.0
STOP_GRACE_S = 30.0


class ProcessFailed(Exception):
    """A process ended too often."""


class Supervised:
    """`prepare` runs once, before the first start; `wait_ready` returns when the process can be used. While there is
    not `has_room` on its disk no number of deaths gives a process up that was healthy before."""

    def __init__(
        self,
        command: Command,
        output: Output,
        *,
        needs: Sequence["Supervised"] = (),
        prepare: Callable[[], Awaitable[None]] | None = None,
        wait_ready: Callable[[], Awaitable[None]],
        tell: Callable[[str], None],
        has_room: Callable[[], bool] = lambda: True,
    ) -> None:
        self.name = command.name
        self.healthy = asyncio.Event()
        self.restarts = 0
        self._command = command
        self._output = output
        self._needs = needs
        self._prepare = prepare
        self._wait_ready = wait_ready
        self._tell = tell
        self._has_room = has_room
        self._was_healthy = asyncio.Event()
        self._stopping = asyncio.Event()
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self._child.running else None

    async def run(self) -> None:
        """Returns after `stop`; ProcessFailed when the process cannot be kept alive."""
        for need in self._needs:
            await need._was_healthy.wait()
        if self._prepare is not None:
            await self._prepare()
        deaths: deque[float] = deque(maxlen=RESTARTS_MAX)
        backoff = Backoff(first_s=RESTART_DELAY_S_MIN, last_s=RESTART_DELAY_S_MAX)
        try:
            while not self._stopping.is_set():
                status = await self._live_once(backoff)
                if self._stopping.is_set():
                    return
                deaths.append(asyncio.get_running_loop().time())
                self._judge(deaths, status)
                delay_s = backoff.next_s()
                self.restarts += 1
                self._tell(f"{self.name} ended ({_told(status)}), starts again in {delay_s:.1f} s")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), timeout=delay_s)
        finally:
            self._output.close()

    def send(self, number: signal.Signals) -> None:
        """Signals the process; `healthy` is false from here until it is up again when that ends it."""
        if self._child is not None:
            if number == signal.SIGKILL:
                self.healthy.clear()
            self._child.send(number)

    async def stop(self) -> None:
        """Asks the process to end, waits, kills it with everything it started."""
        self._stopping.set()
        if self._child is not None:
            await self._child.stop(STOP_GRACE_S)

    async def restart(self) -> None:
        """Ends the process in good order, so that it is started again; returns once it is healthy or stopped."""
        self.healthy.clear()
        if self._child is not None and not self._stopping.is_set():
            await self._child.stop(STOP_GRACE_S)
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(event.wait()) for event in (self.healthy, self._stopping)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()

    def kill(self) -> None:
        """Ends the process at once, for good."""
        self._stopping.set()
        self.send(signal.SIGKILL)

    async def _live_once(self, backoff: Backoff) -> int:
        self._child = await Child.start(self._command, self._output)
        if self._stopping.is_set():
            return await self._child.stop(STOP_GRACE_S)
        watching = asyncio.create_task(self._announce(backoff))
        try:
            return await self._child.wait()
        finally:
            self.healthy.clear()
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def _announce(self, backoff: Backoff) -> None:
        await self._wait_ready()
        self.healthy.set()
        self._was_healthy.set()
        backoff.reset()

    def _judge(self, deaths: deque[float], status: int) -> None:
        full = "" if self._has_room() else "; its disk is full: free space there"
        if self._was_healthy.is_set() and full:
            self._tell(f"{self.name} ended ({_told(status)}){full}")
            deaths.clear()
        if self._was_healthy.is_set():
            too_often = len(deaths) == RESTARTS_MAX and deaths[-1] - deaths[0] < RESTARTS_WINDOW_S
        else:
            too_often = len(deaths) >= FIRST_ATTEMPTS_MAX
        if too_often:
            raise ProcessFailed(
                f"{self.name} ended {len(deaths)} times, the last time with {_told(status)}{full}; "
                f"the end of {self._output.path}:\n{self._output.tail()}"
            )


def _told(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name
