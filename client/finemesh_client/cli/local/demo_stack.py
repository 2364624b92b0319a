"""The processes of the demo: the local stack and the recipe that makes its base model. It speaks no API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from finemesh_client.cli.local.up_command import launcher_command

RECIPE = "services.trainer.train.recipes.main"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
LOG_TAIL_LINES = 30


class DemoFailed(Exception):
    """A step did not do what the demo promises; the message says which."""


async def _lines(process: Process, on_line: Callable[[str], None]) -> None:
    """Hands over the process's stderr line by line; a progress line may end in a carriage return."""
    assert process.stderr is not None
    while raw := await process.stderr.readline():
        on_line(raw.decode(errors="replace").rstrip().rpartition("\r")[2])


async def make_base_model(name: str, folder: Path, cache: Path, on_line: Callable[[str], None]) -> dict[str, object]:
    """Runs the recipe for a small base model, or finds it in the cache, and returns what it says about it."""
    arguments = ("--name", name, "--out", str(folder), "--cache", str(cache))
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", RECIPE, *arguments, stdout=PIPE, stderr=PIPE)
    assert process.stdout is not None
    output, _ = await asyncio.gather(process.stdout.read(), _lines(process, on_line))
    if await process.wait() != 0:
        raise DemoFailed(f"the recipe for {name} failed with exit code {process.returncode}; its last words are above")
    described: dict[str, object] = json.loads(output.decode().splitlines()[-1])
    return described


@contextlib.asynccontextmanager
async def running_stack(data_dir: Path) -> AsyncIterator[dict[str, object]]:
    """A local stack in that folder, healthy; stopped at the end, whatever happens. Yields the launcher's ready line."""
    process = await asyncio.create_subprocess_exec(
        *launcher_command("up", "--data", str(data_dir), "--engine", "vllm", "--quiet", "--json-ready"),
        stdout=PIPE,
        stderr=PIPE,
        # A group of its own: Ctrl-C stops the demo first, which then stops the stack in order.
        start_new_session=True,
    )
    tail: list[str] = []
    errors = asyncio.create_task(_lines(process, lambda line: tail.append(line)))
    try:
        yield await _ready(process, tail)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
        errors.cancel()


async def _ready(process: Process, tail: list[str]) -> dict[str, object]:
    """The launcher's ready line, or DemoFailed with its last words."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while raw := await process.stdout.readline():
                if raw.startswith(b"{"):
                    described: dict[str, object] = json.loads(raw)
                    return described
    except TimeoutError:
        tail.append(f"not healthy after {START_TIMEOUT_S:.0f} s")
    raise DemoFailed("the local stack did not start:\n" + "\n".join(tail[-LOG_TAIL_LINES:]))
