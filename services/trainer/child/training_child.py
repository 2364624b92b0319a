"""One training child: heard line by line, asked to stop, killed, waited for. Not pure: processes.

It knows the form of events; what one means is for the attempt. The child dies with the agent: its standard input ends,
and the kernel kills it when its parent is gone.
"""

import asyncio
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from chassis.spawn import ENDING_S_MAX, LAST_WORDS_LINES_MAX, Spawned, spawn_module
from services.trainer.child.child_environment import child_environment

log = structlog.get_logger()

# What the child told: an object with a `type`.
Event = Mapping[str, Any]


class ChildProtocolError(Exception):
    """The child wrote what is no event."""


class ChildStuckError(Exception):
    """The child was killed and does not die, as a process whose GPU hangs in its driver. Its devices are not free."""


class Child:
    """Use `start`, then read `events` to their end, then `wait`. `kill` may be called at any time, and repeatedly.

    A child that was started without a work folder loads its libraries, writes a `ready` event and waits for `begin`.
    """

    def __init__(self, process: Spawned, job_id: str, ending_s_max: float = ENDING_S_MAX) -> None:
        self._process = process
        self._ending_s_max = ending_s_max
        self._is_stuck = False
        self._ended = asyncio.create_task(process.wait())
        self._log = log.bind(child=process.pid, **({"job": job_id} if job_id else {}))
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS_LINES_MAX)
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def start(
        cls,
        module: str,
        workdir: Path | None,
        *,
        job_id: str,
        threads: int,
        gpu_uuid: str,
        line_bytes_max: int,
        ending_s_max: float,
    ) -> "Child":
        """When this is cancelled, no process is left. `ending_s_max` is what a killed child gets to die."""
        arguments = ("--wait",) if workdir is None else ("--workdir", str(workdir))
        seen = child_environment(os.environ, threads=threads, gpu_uuid=gpu_uuid)
        spawning = asyncio.ensure_future(
            spawn_module(module, arguments, environment=seen, line_bytes_max=line_bytes_max)
        )
        try:
            return cls(await asyncio.shield(spawning), job_id, ending_s_max)
        except asyncio.CancelledError:
            # A process that is just being started cannot be cancelled, only killed.
            await (await spawning).end(ending_s_max)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_words(self) -> str:
        return "\n".join(self._last_words)

    def begin(self, workdir: Path, job_id: str) -> None:
        """Gives a waiting child its work. OSError when it is gone."""
        if self._process.has_ended:
            raise BrokenPipeError(f"child {self.pid} has ended")
        self._log = log.bind(job=job_id, child=self.pid)
        # A short line, which the pipe takes at once.
        self._process.stdin.write(json.dumps({"workdir": str(workdir)}).encode() + b"\n")

    async def events(self) -> AsyncIterator[Event]:
        """Until the child closes its output. ChildProtocolError for anything but JSON objects with a type."""
        while True:
            try:
                line = await self._next_line()
            except ValueError as error:
                raise ChildProtocolError("the child wrote a line over the limit") from error
            # A child that is killed in the middle of a line leaves a torn one, which does not count.
            if not line.endswith(b"\n"):
                return
            yield _event_of(line)

    def ask_to_stop(self) -> None:
        """The child finishes its step, reports it and ends."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> int:
        """The exit code; negative for the signal that ended it.

        Afterwards nothing of its process group is left, and what `events` did not read is lost. A child that does not
        end in time is killed; one that does not die raises ChildStuckError. Whoever else holds its output open is not
        waited for.
        """
        try:
            if not await self._ends_in_time():
                self.kill()
                if not await self._ends_in_time():
                    self._is_stuck = True
                    raise ChildStuckError(f"the training process {self.pid} was killed and does not die")
            await asyncio.wait({self._listener}, timeout=self._ending_s_max)
        finally:
            if self._is_stuck or self._ended.done():
                self._listener.cancel()
                self._process.close()
        return self._ended.result()

    async def _ends_in_time(self) -> bool:
        await asyncio.wait({self._ended}, timeout=0 if self._is_stuck else self._ending_s_max)
        return self._ended.done()

    async def _next_line(self) -> bytes:
        """Empty at the end. Once the child is dead its last lines arrive soon, or another process holds its output."""
        reading = asyncio.ensure_future(self._process.stdout.readline())
        try:
            await asyncio.wait({reading, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await asyncio.wait({reading}, timeout=self._ending_s_max)
            if not reading.done():
                self._log.warning("child_output_held_open")
                return b""
            return reading.result()
        finally:
            reading.cancel()

    async def _listen(self) -> None:
        async for text in self._process.error_lines():
            self._last_words.append(text)
            self._log.info("child_output", text=text)


def _event_of(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise ChildProtocolError("the child wrote a line that is not JSON") from error
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise ChildProtocolError("the child wrote a line that is no event")
    return event
