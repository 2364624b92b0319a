"""The launcher on real PostgreSQL and NATS with services that only live: start, restart, refusal, stop, no orphans."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from deploy.local import supervisor
from deploy.local.folder import StackRunning
from deploy.local.stack import Stack, StackOptions
from deploy.local.supervisor import ProcessFailed
from tests.harness.dummies import DUMMIES

ROOT = Path(__file__).resolve().parents[2]


def _stack(data: Path, **options: Any) -> Stack:
    return Stack(StackOptions(data=data, services=DUMMIES, **options))


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def _gone(pids: list[int]) -> bool:
    for _ in range(300):
        if not any(_alive(pid) for pid in pids):
            return True
        # They are no children of this process, so the kernel does not tell it of their end.
        await asyncio.sleep(0.1)
    return False


async def test_stack_lives_and_leaves_nothing(tmp_path: Path) -> None:
    data = tmp_path / "a data folder"
    async with _stack(data, nodes=2) as stack:
        described = json.loads(stack.folder.state_file.read_text())
        assert set(described["pids"]) == {
            "postgres",
            "nats",
            "gateway",
            "scheduler",
            "billing",
            "inference",
            "trainer-0",
            "trainer-1",
        }
        assert described["public_grpc"] == stack.addresses["gateway.PUBLIC"]
        assert described["api_key_file"] == str(stack.folder.api_key_file)
        assert json.loads(stack.folder.api_key_file.read_text())["api_key"] == "fm_dummy"
        pids = list(described["pids"].values())
        assert all(_alive(pid) for pid in pids)
        url = stack.environment("billing")["FINEMESH_BILLING_DATABASE_URL"]
        connection = await asyncpg.connect(url)
        assert await connection.fetchval("SELECT current_schema()") == "billing"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE TABLE gateway.mine (id bigint)")
        await connection.close()
        for name in ("secrets.json", "stack.json", "api_key.json", "nats/nats.conf"):
            assert (data / name).stat().st_mode & 0o077 == 0, name
        addresses = stack.addresses
    assert await _gone(pids)
    assert not stack.folder.state_file.exists()
    async with _stack(data, nodes=2) as again:
        assert again.addresses == addresses, "a stack keeps its ports"
    assert (data / "bootstraps").read_text() == "x", "the bootstrap runs once per data folder"


async def test_what_dies_comes_back_below_folders_that_stay_closed(tmp_path: Path) -> None:
    """Under root the database's server is another user, which may not pass through the folders above its own."""
    tmp_path.chmod(0o700)
    modes = {parent: parent.stat().st_mode for parent in (tmp_path, *tmp_path.parents)}
    async with _stack(tmp_path) as stack:
        for name in ("billing", "nats", "postgres"):
            killed = await stack.kill(name)
            await stack.wait_healthy(name, timeout_s=90)
            assert stack.pid(name) not in (None, killed)
            assert stack.restarts(name) >= 1
        connection = await asyncpg.connect(stack.environment("gateway")["FINEMESH_GATEWAY_DATABASE_URL"])
        await connection.close()
        assert modes == {parent: parent.stat().st_mode for parent in modes}, "the launcher opens no folder to others"


async def test_second_start_on_one_folder_is_refused_and_another_folder_is_not(tmp_path: Path) -> None:
    async with _stack(tmp_path / "one") as first:
        with pytest.raises(StackRunning, match=r"runs on .*one already"):
            await _stack(tmp_path / "one").start()
        assert first.folder.state_file.exists()
        async with _stack(tmp_path / "two") as second:
            assert not set(first.addresses.values()) & set(second.addresses.values())


async def test_service_that_cannot_start_is_told_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "broken-billing").touch()
    stack = _stack(tmp_path)
    with pytest.raises(ProcessFailed, match=r"billing ended 3 times(.|\n)*billing is told to fail"):
        await stack.start()
    assert not stack.folder.state_file.exists()
    assert stack.folder.holder() is None
    (tmp_path / "broken-billing").unlink()
    async with _stack(tmp_path):
        pass


async def test_process_that_keeps_dying_fails_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTARTS_MAX", 3)
    async with _stack(tmp_path) as stack:
        (tmp_path / "broken-inference").touch()
        await stack.kill("inference")
        with pytest.raises(ProcessFailed, match="inference ended 3 times"):
            await asyncio.wait_for(stack.wait_failed(), timeout=60)


def _launch(data: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.harness.dummies", "up", "--data", str(data), "--json-ready", "--quiet"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_launcher_ends_without_orphans(tmp_path: Path, number: signal.Signals) -> None:
    """SIGKILL too: the kernel then ends the children."""
    launcher = _launch(tmp_path)
    assert launcher.stdout is not None
    ready = json.loads(await asyncio.to_thread(launcher.stdout.readline))
    launcher.send_signal(number)
    _, complaints = await asyncio.to_thread(launcher.communicate, timeout=60)
    assert launcher.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0), complaints
    assert await _gone([pid for pid in ready["pids"].values()])


async def test_stop_command(tmp_path: Path) -> None:
    launcher = _launch(tmp_path)
    assert launcher.stdout is not None
    ready = json.loads(await asyncio.to_thread(launcher.stdout.readline))
    command = [sys.executable, "-m", "deploy.local", "stop", "--data", str(tmp_path)]
    await asyncio.to_thread(subprocess.run, command, cwd=ROOT, check=True, timeout=60)
    assert await asyncio.to_thread(launcher.wait, timeout=60) == 0
    assert await _gone(list(ready["pids"].values()))
