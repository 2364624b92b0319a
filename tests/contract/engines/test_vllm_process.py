"""The computing process of vLLM dies with its service, is missed when it dies first, and is gone after `stop`.

Each test starts an engine of its own (about twenty seconds): what is killed cannot be shared.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chassis.objects.held_folders import HeldFolders
from formats.rows import Message
from services.inference.engines.base import EngineFailed, Sampling
from services.inference.engines.choice import open_engine
from services.inference.engines.socket_folders import PREFIX
from tests.contract.engines.asking import ask, request_for
from tests.contract.engines.conftest import SETTINGS

ROOT = Path(__file__).parents[3]
# Generous, because a loaded machine runs the tests too; an orphan would live for ever.
GONE_WITHIN_S = 20.0
IMPORTED_WITHIN_S = 180.0

PARENT = """
    import asyncio, multiprocessing, pathlib, sys
    from services.inference.engines.base import EngineSettings
    from services.inference.engines.choice import open_engine

    async def main():
        engine = await open_engine("vllm", pathlib.Path(sys.argv[1]), EngineSettings(kv_cache_bytes=1 << 26))
        starting = asyncio.create_task(engine.start())
        while not multiprocessing.active_children():
            await asyncio.sleep(0.05)
        child = multiprocessing.active_children()[0].pid
        if sys.argv[2] == "started":
            await starting
        print(child, flush=True)
        await asyncio.sleep(600)

    if __name__ == "__main__":
        asyncio.run(main())
"""


@pytest.fixture
def sockets() -> Iterator[Path]:
    """Not pytest's own folder: the path of a socket has at most about a hundred characters."""
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("moment", ["starting", "started"])
def test_a_killed_service_leaves_no_computing_process(
    base_model: Path, tmp_path: Path, sockets: Path, moment: str
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen(
        [sys.executable, str(script), str(base_model), moment],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(sockets)},
        text=True,
    )
    assert parent.stdout is not None
    child, folders = int(parent.stdout.readline()), HeldFolders(sockets, prefix=PREFIX)
    assert folders.sweep() == [], "they are in use"
    parent.kill()
    parent.wait()
    # A child whose parent is killed while it still imports its libraries notices when that is done.
    deadline = time.monotonic() + (GONE_WITHIN_S if moment == "started" else IMPORTED_WITHIN_S)
    while _alive(child):
        assert time.monotonic() < deadline, "the computing process outlived its service"
        # Its parent is dead: there is nobody whom the kernel would tell.
        time.sleep(0.1)
    # Nobody was left to remove its sockets; the sweep of another process does.
    (left,) = sockets.glob(f"{PREFIX}*")
    assert folders.sweep() == [left.name]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("cause", ["killed", "deadline"])
async def test_a_dead_computing_process_fails_requests_and_is_reported(base_model: Path, cause: str) -> None:
    others = set(multiprocessing.active_children())
    engine = await open_engine("vllm", base_model, SETTINGS)
    await engine.start()
    prompt = await engine.render_chat([Message(role="user", content="hm")])
    asked = [asyncio.create_task(ask(engine, request_for(prompt, Sampling(temperature=0.0)))) for _ in range(2)]
    # Long enough for the requests to reach the other process, which tells nobody what it computes.
    await asyncio.sleep(0.05)
    (child,) = set(multiprocessing.active_children()) - others
    assert child.pid is not None
    if cause == "killed":
        os.kill(child.pid, signal.SIGKILL)
    else:
        engine.serve_until(time.monotonic() + 0.1)
        # This process stands still, as a frozen one does; the computing one ends all the same.
        deadline = time.monotonic() + GONE_WITHIN_S
        while _alive(child.pid):
            assert time.monotonic() < deadline, "the computing process went on with devices that may be another's"
            time.sleep(0.1)  # noqa: ASYNC251
    failures = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), GONE_WITHIN_S)
    assert [type(failure) for failure in failures] == [EngineFailed, EngineFailed]
    assert isinstance(await asyncio.wait_for(engine.wait_failed(), GONE_WITHIN_S), EngineFailed)
    with pytest.raises(EngineFailed):
        await engine.health()
    with pytest.raises(EngineFailed):
        await ask(engine, request_for(prompt))
    assert engine.requests_unfinished == 0
    await engine.stop()


async def test_a_stop_ends_requests_and_processes(base_model: Path) -> None:
    others = set(multiprocessing.active_children())
    engine = await open_engine("vllm", base_model, SETTINGS)
    await engine.start()
    prompt = await engine.render_chat([Message(role="user", content="hm")])
    asked = asyncio.create_task(ask(engine, request_for(prompt, Sampling(temperature=0.0))))
    # As above.
    await asyncio.sleep(0.05)
    await engine.stop()
    with pytest.raises(EngineFailed):
        await asyncio.wait_for(asked, GONE_WITHIN_S)
    assert set(multiprocessing.active_children()) <= others
    with pytest.raises(EngineFailed):
        await engine.health()
    await engine.stop()


async def test_a_start_that_is_cancelled_leaves_no_process(base_model: Path) -> None:
    others = set(multiprocessing.active_children())
    engine = await open_engine("vllm", base_model, SETTINGS)
    starting = asyncio.create_task(engine.start())
    while set(multiprocessing.active_children()) <= others:
        # vLLM tells nobody that it has made a process.
        await asyncio.sleep(0.05)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(starting, 60.0)
    await engine.stop()
    assert set(multiprocessing.active_children()) <= others


async def test_a_folder_without_weights_does_not_start(base_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base_model / name).read_bytes())
    others = set(multiprocessing.active_children())
    engine = await open_engine("vllm", tmp_path, SETTINGS)
    with pytest.raises(EngineFailed):
        await engine.start()
    await engine.stop()
    assert set(multiprocessing.active_children()) <= others
