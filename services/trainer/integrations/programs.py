"""Runs the programs of integrations, and the protocol that both ends speak. Not pure: processes, the environment.

A program reads one JSON object per line from standard input and answers with one per line on standard output. The first
line is its request. It ends when its input ends. It sees a home of its own, so that it finds no credentials of the
node's user, and the settings of a proxy. This file knows no service outside.
"""

import asyncio
import contextlib
import json
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from chassis.spawn import ENDING_S_MAX, Spawned, spawn_module

LINE_BYTES_MAX = 64 * 1024
# The home of the programs, below the work folder of an attempt.
HOME = "integrations"
_PASSED_ON = frozenset(
    {"PATH", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD"}
    | {"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
    | {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"}
)

Document = Mapping[str, Any]


class Program:
    """The agent's end of one running program."""

    def __init__(self, process: Spawned) -> None:
        self._process = process

    async def send(self, document: Document) -> None:
        """One line. OSError when the program is gone; it blocks a thread while the program does not read."""
        await asyncio.to_thread(self._process.stdin.write, json.dumps(document).encode() + b"\n")

    async def receive(self) -> Document | None:
        """The next line of its answer; None when it ended, or wrote something else than a JSON object."""
        with contextlib.suppress(ValueError):
            answer = json.loads(await self._process.stdout.readline())
            return answer if isinstance(answer, dict) else None
        return None

    async def finish(self) -> None:
        """Ends its input and waits until it has ended."""
        self._process.stdin.close()
        await self._process.wait()


@contextlib.asynccontextmanager
async def running(module: str, home: Path) -> AsyncIterator[Program]:
    """The program `module`, started; at the end it is killed. OSError when it cannot be started."""
    await asyncio.to_thread(home.mkdir, parents=True, exist_ok=True)
    process = await spawn_module(
        module,
        (),
        environment=environment_of(os.environ, home),
        line_bytes_max=LINE_BYTES_MAX,
    )
    drain = asyncio.create_task(_drop_all(process.stderr))
    try:
        yield Program(process)
    finally:
        drain.cancel()
        await process.end(ENDING_S_MAX)


def environment_of(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """What a program sees: no addresses of the mesh, no credentials of the store or of the node's user."""
    return {name: value for name, value in environment.items() if name in _PASSED_ON} | {
        "HOME": str(home),
        "HF_HOME": str(home / "hub"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # One way up, the one that is tested; the other needs a native library and a second kind of server.
        "HF_HUB_DISABLE_XET": "1",
        "WANDB_ERROR_REPORTING": "false",
        "PYTHONUNBUFFERED": "1",
    }


def answer_one(answer: Callable[[Document], Document]) -> None:
    """The program's end, for a program with one request and one answer. It exits when nobody waits for the answer."""
    request = next(read_lines())
    threading.Thread(target=_exit_when_orphaned, daemon=True).start()
    write_line(sys.stdout, answer(request))


def read_lines() -> Iterator[Document]:
    """The program's input: its request, then whatever else the agent sends, to the end."""
    while line := sys.stdin.readline():
        yield json.loads(line)


def write_line(output: TextIO, document: Document) -> None:
    output.write(json.dumps(document) + "\n")
    output.flush()


@contextlib.contextmanager
def output_for_answers() -> Iterator[TextIO]:
    """The program's output, for answers only: what a library prints goes to standard error."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        yield answers


def root_of(error: BaseException) -> str:
    """The kind of the error at the root of `error`. Messages are left out: they may hold signed addresses."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__


async def _drop_all(stream: asyncio.StreamReader) -> None:
    """Error messages of a library may hold secrets, so they are not kept. Unread, a full pipe would block it."""
    with contextlib.suppress(OSError):
        while await stream.read(LINE_BYTES_MAX):
            continue


def _exit_when_orphaned() -> None:
    """The agent keeps the input open for as long as it wants an answer."""
    while sys.stdin.read(1):
        continue
    os._exit(1)
