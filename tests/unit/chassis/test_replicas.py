"""One of two replicas freezes or ends: calls to it fail within a bound, and those after it go to the other."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from chassis.errors import Unavailable
from chassis.rpc.channel import open_channel
from chassis.rpc.replicas import split_addresses
from tests.harness.polling import eventually

from .echo import EchoStub, settings_of

# Less than the minute after which gRPC by itself leaves a peer that answers no ping.
DEADLINE_S = 45.0
ROOT = Path(__file__).parents[3]


@pytest.fixture
def servers(tls_dir: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.harness.echo_process", str(tls_dir), str(tmp_path / str(number))],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
            stdout=subprocess.DEVNULL,
        )
        for number in range(2)
    ]
    yield started
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


@asynccontextmanager
async def both(tls_dir: Path, folder: Path) -> AsyncIterator[EchoStub]:
    """A stub over both servers, once each has answered."""
    for number in range(2):
        await eventually(lambda number=number: asyncio.sleep(0, (folder / str(number)).exists()))  # type: ignore[misc]
    addresses = [f"127.0.0.1:{(folder / str(number)).read_text().strip()}" for number in range(2)]
    settings = settings_of("front", tls_dir, keepalive_s=1.0, keepalive_timeout_s=1.0)
    async with open_channel(settings, ", ".join(addresses), "back") as channel:
        stub = EchoStub(channel)
        heard: set[str] = set()

        async def ask() -> int:
            heard.add((await stub.Say(StringValue())).value)
            return len(heard)

        await eventually(ask, lambda count: count == 2)
        yield stub


async def ask(stub: EchoStub) -> str:
    """Who answered, `left` for a call whose replica was given up; any other error is raised."""
    try:
        answer: StringValue = await stub.Say(StringValue(), timeout=DEADLINE_S)
    except Unavailable:
        return "left"
    return answer.value


async def test_a_frozen_replica_is_left(tls_dir: Path, tmp_path: Path, servers: list[subprocess.Popen[bytes]]) -> None:
    async with both(tls_dir, tmp_path) as stub:
        frozen, other = servers
        frozen.send_signal(signal.SIGSTOP)
        # Calls that are under way on the frozen one fail before their deadline, and half were sent there.
        answers = await asyncio.gather(*(ask(stub) for _ in range(10)))
        assert set(answers) == {str(other.pid), "left"}
        # From then on it gets none, though it is still there with its port open.
        assert {await ask(stub) for _ in range(20)} == {str(other.pid)}
        streamed = [each.value async for each in stub.Count(StringValue(value="3"), timeout=DEADLINE_S)]
        assert streamed == [str(other.pid)] * 3

        frozen.send_signal(signal.SIGCONT)
        await eventually(lambda: ask(stub), lambda answer: answer == str(frozen.pid))


async def test_a_replica_that_froze_unnoticed_gets_no_call(
    tls_dir: Path, tmp_path: Path, servers: list[subprocess.Popen[bytes]]
) -> None:
    async with both(tls_dir, tmp_path) as stub:
        frozen, other = servers
        frozen.send_signal(signal.SIGSTOP)
        # The time of an idle connection itself: nothing tells when it is given up.
        await asyncio.sleep(5)
        assert {await ask(stub) for _ in range(20)} == {str(other.pid)}


async def test_a_replica_that_ended_is_passed_over(
    tls_dir: Path, tmp_path: Path, servers: list[subprocess.Popen[bytes]]
) -> None:
    async with both(tls_dir, tmp_path) as stub:
        gone, other = servers
        gone.kill()
        gone.wait()

        async def answers() -> set[str]:
            """Of several in a row: one alone may be the other's turn before the end of the first is noticed."""
            return {await ask(stub) for _ in range(4)}

        await eventually(answers, lambda found: found == {str(other.pid)})
        assert {await ask(stub) for _ in range(20)} == {str(other.pid)}


def test_addresses_of_a_setting() -> None:
    assert split_addresses(" a:1, b:2,,[::1]:3 ") == ["a:1", "b:2", "[::1]:3"]
