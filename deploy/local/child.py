"""One child process with everything that it starts: begun, listened to, asked to end, ended. It restarts nothing."""

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.process_output import Output


@dataclass(frozen=True, kw_only=True)
class Command:
    """`user` is the system user to run as, None for our own. `stop_signal` asks for an orderly end."""

    name: str
    arguments: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    # What the kernel sends when the launcher itself dies without a goodbye.
    death_signal: signal.Signals = signal.SIGKILL


class Child:
    """A started process in a session of its own, so that a Ctrl-C in the terminal reaches only the launcher."""

    def __init__(self, command: Command, process: asyncio.subprocess.Process, output: Output) -> None:
        assert process.stdout is not None
        self.command = command
        self.pid = process.pid
        self._process = process
        self._session_ended = False
        self._copying = asyncio.create_task(output.copy(process.stdout))

    @classmethod
    async def start(cls, command: Command, output: Output) -> "Child":
        process = await asyncio.create_subprocess_exec(
            *launched(command.arguments, user=command.user, death_signal=command.death_signal),
            cwd=command.folder,
            env={**os.environ, **command.environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        return cls(command, process, output)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """The exit status, negative for a signal; whatever the process left in its session is ended too."""
        status = await self._process.wait()
        self._end_session()
        # Somebody who left the session may still hold the pipe; what it says later is not ours to wait for.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._copying, timeout=1)
        return status

    def send(self, number: signal.Signals) -> None:
        if self.running:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, grace_s: float) -> int:
        """Asks, waits `grace_s`, then kills."""
        self.send(self.command.stop_signal)
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self._end_session()
        return await self.wait()

    def _end_session(self) -> None:
        """Right after the end and only once: later the number may belong to somebody else's session."""
        if self._session_ended:
            return
        self._session_ended = not self.running
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def launched(arguments: Sequence[str], *, user: str | None, death_signal: signal.Signals) -> list[str]:
    """The command line behind a helper that gives up our rights for those of `user`, and that makes the kernel signal
    the process when the launcher dies, which only Linux can do.

    A helper program and not code between fork and exec: the launcher has threads, in which such code deadlocks.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        if user is not None:
            raise RuntimeError("setpriv (of util-linux) is missing, so PostgreSQL cannot be run as another user")
        return list(arguments)
    rights = () if user is None else ("--reuid", user, "--regid", user, "--clear-groups")
    return [setpriv, *rights, "--pdeathsig", death_signal.name.removeprefix("SIG"), "--", *arguments]
