"""Starts a Python module as a process, in a process group of its own. Not pure: processes, sockets.

It does not use asyncio's own subprocesses: those fork, and gRPC's fork handlers can abort the new process before it
runs its program. `subprocess` uses vfork, which runs no such handler. It knows nothing of what is started.

What the process writes comes through socket pairs. A pipe would have two owners under uvloop: libuv and the file object
close the same descriptor one after the other, and a descriptor that another thread opened in between would be closed.
"""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import IO

import structlog

log = structlog.get_logger()

# What a child may see of our environment: no addresses, no credentials of the store.
_ENVIRONMENT_NAMES = frozenset(
    {"PATH", "HOME", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD"}
)
_ENVIRONMENT_PREFIXES = ("LC_",)

LAST_WORDS_LINES_MAX = 20
# What a killed process gets to end, and its output to arrive, unless settings say otherwise.
ENDING_S_MAX = 30.0
LOG_LINE_CHARS_MAX = 2000

_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Spawned:
    """A Python module that runs as a process. It leads a group of its own, which dies with it. `close` comes last."""

    def __init__(self, process: "subprocess.Popen[bytes]", stdout: _Stream, stderr: _Stream) -> None:
        assert process.stdin is not None
        self.pid = process.pid
        self.stdin: IO[bytes] = process.stdin
        self.stdout, stdout_end = stdout
        self.stderr, stderr_end = stderr
        self._ends = (stdout_end, stderr_end)
        self._process = process
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        # A daemon, so that a process that does not end cannot keep us from ending.
        threading.Thread(target=self._bury, args=(asyncio.get_running_loop(),), daemon=True).start()

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    async def wait(self) -> int:
        """The exit code; negative for the signal that ended it."""
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        """Asks the process, not its group."""
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """The whole group, at once."""
        if not self.has_ended:
            _kill_group(self.pid)

    async def end(self, wait_s_max: float) -> bool:
        """Kills it and closes our ends of its streams; False when it has not ended in time, as in a stuck driver."""
        self.kill()
        try:
            async with asyncio.timeout(wait_s_max):
                await self.wait()
        except TimeoutError:
            log.error("process_does_not_die", child=self.pid)
            return False
        finally:
            self.close()
        return True

    def close(self) -> None:
        """Our ends of its streams; what was not read by now is lost. Any number of times."""
        self.stdin.close()
        for end in self._ends:
            end.close()

    def limit(self, kind: int, value: int) -> None:
        """One of the `resource.RLIMIT_` limits, where the system can set it from outside."""
        if sys.platform == "linux":
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(self.pid, kind, (value, value))

    async def error_lines(self) -> AsyncIterator[str]:
        """What it writes to its standard error, in lines of bounded length, to its end."""
        while True:
            try:
                line = await self.stderr.readline()
            except ValueError:
                # Over the limit: the reader dropped it and goes on.
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()[:LOG_LINE_CHARS_MAX]
            if text:
                yield text

    def _bury(self, loop: asyncio.AbstractEventLoop) -> None:
        # Waits without reaping: as long as the leader is a zombie, nobody else can get its id or its group's.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        # What the process started may outlive it, hold a GPU, and keep our pipes open.
        _kill_group(self.pid)
        code = self._process.wait()
        # The loop is gone when we are on our way out ourselves.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._tell, code)

    def _tell(self, code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(code)


async def spawn_module(
    module: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    line_bytes_max: int,
    pass_fds: Sequence[int] = (),
) -> Spawned:
    """Runs `python -m module`, which sees this environment and nothing else of ours.

    Call it from the main thread: the kernel ends a process that asked to die with its parent when the thread that
    started it ends. `pass_fds` are descriptors that it gets under the same numbers.
    """
    with contextlib.ExitStack() as unless_started:
        stdout, their_stdout = socket.socketpair()
        stderr, their_stderr = socket.socketpair()
        for end in (stdout, stderr):
            unless_started.callback(end.close)
        with their_stdout, their_stderr:
            # Blocks for the milliseconds of a vfork. In a worker thread it would not, but the process would die with
            # that thread.
            process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=their_stdout.fileno(),
                stderr=their_stderr.fileno(),
                bufsize=0,
                env=dict(environment),
                pass_fds=pass_fds,
                start_new_session=True,
            )
        unless_started.callback(process.wait)
        unless_started.callback(_kill_group, process.pid)
        streams = [await asyncio.open_unix_connection(sock=end, limit=line_bytes_max) for end in (stdout, stderr)]
        unless_started.pop_all()
    return Spawned(process, *streams)


def harmless_environment(environment: Mapping[str, str], prefixes: tuple[str, ...] = ()) -> dict[str, str]:
    """What any program may see of it: where things lie and the language, no address and no credential."""
    return {
        name: value
        for name, value in environment.items()
        if name in _ENVIRONMENT_NAMES or name.startswith((*_ENVIRONMENT_PREFIXES, *prefixes))
    } | {"PYTHONUNBUFFERED": "1"}


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
