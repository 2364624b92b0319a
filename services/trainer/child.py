"""One training child as a process: started in its own group, heard line by line, stopped, killed, buried.

It knows pipes, signals and exit codes; what an event means is for the attempt. The child dies with the agent: its
standard input ends, and the kernel kills it when its parent is gone.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger()

LAST_WORDS_LINES_MAX = 20
LOG_LINE_CHARS_MAX = 2000
# What a child may see of the agent's environment: no addresses, no credentials of the store.
_ENVIRONMENT_NAMES = frozenset(
    {"PATH", "HOME", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD"}
)
_ENVIRONMENT_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH", "PYTORCH_", "MKL_", "TRITON_", "XDG_")


class ChildProtocolError(Exception):
    """The child wrote what is no event."""


class Child:
    """Use `start`, then read `events` to their end, then `wait`; `kill` is right at any time and any number of times."""

    def __init__(self, process: asyncio.subprocess.Process, job_id: str) -> None:
        self._process = process
        self._log = log.bind(job=job_id, child=process.pid)
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS_LINES_MAX)
        self._listener = asyncio.create_task(self._listen())
        self._burial = asyncio.create_task(self._bury())

    @classmethod
    async def start(
        cls, module: str, workdir: Path, *, job_id: str, threads: int, gpu_uuid: str, line_bytes_max: int
    ) -> "Child":
        """`gpu_uuid` empty: the child sees no GPU."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, "--workdir", str(workdir)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=line_bytes_max,
            env=child_environment(os.environ, threads=threads, gpu_uuid=gpu_uuid),
            start_new_session=True,
        )
        return cls(process, job_id)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_words(self) -> str:
        return "\n".join(self._last_words)

    async def events(self) -> AsyncIterator[Mapping[str, Any]]:
        """Until the child closes its output. ChildProtocolError for anything but JSON objects with a type."""
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError as error:
                raise ChildProtocolError("the child wrote a line over the limit") from error
            # A child that is killed in the middle of a line leaves a torn one: it said nothing.
            if not line.endswith(b"\n"):
                return
            yield _event_of(line)

    def ask_to_stop(self) -> None:
        """The child finishes its step, tells it and ends."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """The whole group, at once."""
        if self._process.returncode is None:
            _kill_group(self._process.pid)

    async def wait(self) -> int:
        """The exit code; negative for the signal that ended it. Nothing of the group is left afterwards."""
        await asyncio.shield(self._burial)
        await asyncio.shield(self._listener)
        assert self._process.returncode is not None
        return self._process.returncode

    async def _bury(self) -> None:
        await self._process.wait()
        # What the child started may outlive it, hold a GPU, and keep our pipes open.
        _kill_group(self._process.pid)

    async def _listen(self) -> None:
        assert self._process.stderr is not None
        while True:
            try:
                line = await self._process.stderr.readline()
            except ValueError:
                # Over the limit: the reader dropped it and goes on.
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()[:LOG_LINE_CHARS_MAX]
            if text:
                self._last_words.append(text)
                self._log.info("training child", text=text)


def child_environment(environment: Mapping[str, str], *, threads: int, gpu_uuid: str) -> dict[str, str]:
    """What the child is told of this machine, and that there is no hub to ask."""
    kept = {
        name: value
        for name, value in environment.items()
        if name in _ENVIRONMENT_NAMES or name.startswith(_ENVIRONMENT_PREFIXES)
    }
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": gpu_uuid,
        "PYTHONUNBUFFERED": "1",
    }


def _event_of(line: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise ChildProtocolError("the child wrote a line that is not JSON") from error
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise ChildProtocolError("the child wrote a line that is no event")
    return event


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
