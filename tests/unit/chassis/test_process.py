"""The life of a process: what stops it, in which order it drains, and the exit code; with real signals."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from chassis import identity
from chassis.identity import Caller
from chassis.process import DrainStage, Process
from chassis.rpc import deadline

from .echo import settings_of

DAEMON = """
import asyncio, sys
from pathlib import Path
from chassis.process import DrainStage, Process, run
from chassis.settings import ChassisSettings
from chassis.telemetry import trace as telemetry

how, folder = sys.argv[1], Path(sys.argv[2])
settings = ChassisSettings(service_name="daemon", drain_grace_s=1.0,
                           otlp_endpoint=sys.argv[3] if len(sys.argv) > 3 else None)

def say(what):
    with (folder / "story").open("a") as story:
        story.write(what + "\\n")

async def main(process):
    async def work(name):
        try:
            await asyncio.Event().wait()
        finally:
            say(f"{name} cancelled")

    async def drain(stage):
        if how == "stuck" and stage is DrainStage.FINISH_CALLS:
            await asyncio.Event().wait()
        say(stage.name)

    for stage in reversed(DrainStage):
        process.on_drain(stage, lambda stage=stage: drain(stage))
    (folder / "cache" / "artifacts").mkdir(parents=True)
    process.spawn("loop", lambda: work("loop"))
    process.spawn("relay", lambda: work("relay"), until=DrainStage.RELEASE_LEASES)
    with telemetry.span("wiring"):
        await asyncio.sleep(0.01)
    if how == "fail":
        async def fail():
            raise ValueError("no disk")
        process.spawn("broken", fail)
    print("ready", flush=True)
    if how == "hang":
        await asyncio.Event().wait()

sys.exit(run(main, settings))
"""

IN_ORDER = [
    "NOT_SERVING",
    "STOP_CONSUMING",
    "loop cancelled",
    "FINISH_CALLS",
    "RELEASE_LEASES",
    "relay cancelled",
    "CLOSE_BUS",
    "CLOSE_POOL",
]


async def live(how: str, folder: Path, number: signal.Signals | None, endpoint: str = "") -> tuple[int, list[str], str]:
    """Runs the daemon until it is ready, sends the signal, and gives exit code, story and log."""
    arguments = [how, str(folder), *([endpoint] if endpoint else [])]
    daemon = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        DAEMON,
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    try:
        async with asyncio.timeout(30):
            if number is not None:
                assert daemon.stdout is not None
                assert await daemon.stdout.readline() == b"ready\n"
                daemon.send_signal(number)
            _, log = await daemon.communicate()
    finally:
        if daemon.returncode is None:
            daemon.kill()
    assert daemon.returncode is not None
    return daemon.returncode, (folder / "story").read_text().splitlines(), log.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_in_order_and_exits_with_zero(tmp_path: Path, number: signal.Signals) -> None:
    code, story, _ = await live("serve", tmp_path, number)
    assert (code, story) == (0, IN_ORDER)


async def test_a_signal_ends_a_start_that_hangs(tmp_path: Path) -> None:
    code, story, _ = await live("hang", tmp_path, signal.SIGTERM)
    assert (code, story) == (0, IN_ORDER)


async def test_the_first_failure_drains_in_order_and_exits_with_one(tmp_path: Path) -> None:
    code, story, log = await live("fail", tmp_path, None)
    assert (code, story) == (1, IN_ORDER)
    lines = [json.loads(line) for line in log.splitlines()]
    failure = next(line for line in lines if line["event"] == "task_failed")
    assert failure["service"] == "daemon"
    assert "no disk" in failure["exception"]


async def test_a_stage_that_hangs_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    code, story, _ = await live("stuck", tmp_path, signal.SIGTERM)
    assert (code, story) == (1, [step for step in IN_ORDER if step != "FINISH_CALLS"])


async def test_spans_reach_a_collector_when_an_endpoint_is_set(tmp_path: Path) -> None:
    names: list[str] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, context: object) -> object:
            for resource in request.resource_spans:
                names.extend(span.name for scope in resource.scope_spans for span in scope.spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        code, _, _ = await live("serve", tmp_path, signal.SIGTERM, f"http://127.0.0.1:{port}")
    finally:
        await server.stop(None)
    assert (code, names) == (0, ["wiring"])


async def test_spawned_work_does_not_inherit_the_call_that_spawned_it(tmp_path: Path) -> None:
    process = Process(settings_of("daemon", tmp_path))
    seen: list[object] = []

    async def look() -> None:
        seen.extend([identity.caller_or_none(), deadline.remaining_s()])
        process.stop()

    async def main(_: Process) -> None:
        with identity.acting_as(Caller(service="front")), deadline.limit(5):
            process.spawn("look", look)

    await process.live(main)
    assert seen == [None, None]


async def test_a_failed_drain_is_a_failure_and_the_other_stages_still_run(tmp_path: Path) -> None:
    process, story = Process(settings_of("daemon", tmp_path)), []

    def step(name: str, error: Exception | None = None) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            story.append(name)
            if error is not None:
                raise error

        return run

    async def main(_: Process) -> None:
        process.on_drain(DrainStage.CLOSE_POOL, step("pool"))
        process.on_drain(DrainStage.NOT_SERVING, step("health", OSError("gone")))
        process.on_drain(DrainStage.NOT_SERVING, step("also health"))
        process.stop()

    await process.live(main)
    assert sorted(story[:2]) == ["also health", "health"]
    assert story[2:] == ["pool"]
    assert isinstance(process.failure, OSError)


async def test_what_a_daemon_makes_is_its_owners_alone(tmp_path: Path) -> None:
    await live("serve", tmp_path, signal.SIGTERM)
    made = [tmp_path / name for name in ("story", "cache", "cache/artifacts")]
    assert [path.stat().st_mode & 0o077 for path in made] == [0, 0, 0]
