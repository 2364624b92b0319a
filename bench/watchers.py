"""An agent's heartbeat beside a thousand watchers and as many reads as the scheduler takes, in one real scheduler.

Run it: `make bench-watchers`. The queue holds 20,000 jobs and moves all the time; watchers and readers are a process of
their own that speaks for users as the gateway does. The peer is the same heartbeat with nobody else there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import uvloop

from bench.report import last_line, machine, pace
from chassis import pki
from chassis.errors import DomainError
from chassis.identity import Caller, acting_as
from chassis.rpc.channel import NO_DEADLINE, open_channel
from chassis.settings import ChassisSettings
from finemesh.nodes.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2, tuning_service_pb2_grpc
from tests.harness.fixtures import node_tls_dir
from tests.harness.polling import eventually
from tests.harness.servers import running_nats, running_postgres

ROOT = Path(__file__).resolve().parents[1]
JOBS = 20_000
WATCHERS = 1_000
# Also the scheduler's `concurrent_calls_max`, so that its cap is full all the time.
READS = 64
BEATS_S = 45.0
BEAT_PAUSE_S = 0.1
MOVE_PAUSE_S = 0.25
LEASE_S = 10.0
KEYS = 20
OWNER = Caller(service="gateway", tenant="proj_a", account="org_a", subject="key_a", namespace="team")


def job_id(number: int) -> str:
    return f"ft{number:08d}"


def settings_of(service: str, tls_dir: Path) -> ChassisSettings:
    return ChassisSettings(service_name=service, tls_dir=tls_dir)


@contextlib.asynccontextmanager
async def scheduler(url: str, nats_url: str, tls_dir: Path, folder: Path) -> AsyncIterator[tuple[str, str]]:
    """A scheduler process; its address for users, and that for agents."""
    port_files = {"port_file": folder / "users.port", "agents_port_file": folder / "agents.port"}
    values = {
        "database_url": url,
        "nats_url": nats_url,
        "tls_dir": tls_dir,
        "listen_address": "127.0.0.1:0",
        "agents_address": "127.0.0.1:0",
        "lease_duration_s": LEASE_S,
        "concurrent_calls_max": READS,
        "streams_max": WATCHERS,
        **port_files,
    }
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
    environment |= {f"FINEMESH_SCHEDULER_{key.upper()}": str(value) for key, value in values.items()}
    with (folder / "scheduler.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.scheduler.main", env=environment, cwd=ROOT, stdout=log, stderr=log
        )
    try:
        for path in port_files.values():
            await eventually(lambda path=path: asyncio.sleep(0, path.exists()), bool)  # type: ignore[misc]
        users, agents = (f"127.0.0.1:{path.read_text().strip()}" for path in port_files.values())
        yield users, agents
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if await process.wait() != -signal.SIGKILL:
            print(f"the scheduler ended by itself:\n{(folder / 'scheduler.log').read_text()[-3000:]}")


async def fill_queue(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    spec = tuning_job_pb2.TuningSpec(base_model="finemesh/demo-llama").SerializeToString()
    await connection.execute(
        """
        INSERT INTO jobs (
            job_id, project_id, organization_id, api_key_id, namespace, request_sha256, state, spec, base_model,
            base_revision, parameter_count, output_name, gpu_count, memory_bytes_min, base_artifact, training_artifact,
            counts, hold_id, wake_at, create_time, queue_time, update_time
        )
        SELECT
            'ft' || lpad(number::text, 8, '0'), 'proj_a', 'org_a', 'key_a', 'team', '', 'QUEUED', $1,
            'finemesh/demo-llama', 'rv', 1000, 'out-' || number, 1, 0, '', '', '', 'hold', now(), now(),
            now() + make_interval(secs => number / 1000.0), now()
        FROM generate_series(0, $2 - 1) AS number
        """,
        spec,
        JOBS,
    )
    await connection.execute("VACUUM ANALYZE jobs")


async def move_queue(url: str) -> None:
    """The job in front is cancelled, again and again, so that everybody moves up."""
    connection = await asyncpg.connect(url)
    try:
        for number in range(JOBS):
            await connection.execute(
                "UPDATE jobs SET state = 'CANCELLED', end_time = now(), update_time = now() "
                "WHERE job_id = $1 AND state = 'QUEUED'",
                job_id(number),
            )
            await connection.execute("SELECT pg_notify('scheduler', $1)", f"job:{job_id(number)}\nqueue")
            await asyncio.sleep(MOVE_PAUSE_S)
    finally:
        await connection.close()


class Heartbeat:
    """One agent's stream; a new one when it breaks, as an agent opens it."""

    def __init__(self, stub: node_service_pb2_grpc.NodeServiceAsyncStub) -> None:
        self._stub = stub
        self._answered = asyncio.Event()
        self._open()
        self.broken = 0

    async def beat(self) -> float:
        """The time to the next answer, in seconds; those before were heard already."""
        began = time.perf_counter()
        while True:
            self._answered.clear()
            answered = asyncio.create_task(self._answered.wait())
            with contextlib.suppress(DomainError, asyncio.InvalidStateError):
                await self._stream.write(node_service_pb2.HeartbeatRequest(node="n1", incarnation="i1"))
            await asyncio.wait({answered, self._hearing}, return_when=asyncio.FIRST_COMPLETED)
            if answered.done():
                return time.perf_counter() - began
            self.broken += 1
            self._stream.cancel()
            await asyncio.sleep(BEAT_PAUSE_S)
            self._open()

    def _open(self) -> None:
        self._stream = self._stub.Heartbeat(timeout=NO_DEADLINE)
        self._hearing = asyncio.create_task(self._hear(self._stream))

    async def _hear(self, stream: Any) -> None:
        with contextlib.suppress(DomainError):
            while await stream.read() is not grpc.aio.EOF:
                self._answered.set()

    async def beats(self) -> list[float]:
        """The time of each until `BEATS_S` are over."""
        latencies = []
        end = time.perf_counter() + BEATS_S
        while time.perf_counter() < end:
            latencies.append(await self.beat())
            await asyncio.sleep(BEAT_PAUSE_S)
        return latencies


async def users(target: str, tls_dir: Path) -> None:
    """Watches and reads until it is ended; says when all watchers have their first message, and what it got then."""
    messages, refused, reads = 0, 0, 0
    first: set[int] = set()
    everybody = asyncio.Event()

    async with open_channel(settings_of("gateway", tls_dir), target, "scheduler") as channel:
        stub = tuning_service_pb2_grpc.TuningServiceStub(channel)

        async def watch(number: int) -> None:
            nonlocal messages, refused
            name = f"projects/proj_a/tuningJobs/{job_id(JOBS - 1 - number)}"
            caller = Caller(**{**vars(OWNER), "subject": f"key_{number % KEYS}"})
            while True:
                try:
                    with acting_as(caller):
                        stream = stub.WatchTuningJob(tuning_service_pb2.WatchTuningJobRequest(name=name))
                    async for _ in stream:
                        messages += 1
                        first.add(number)
                        if len(first) == WATCHERS:
                            everybody.set()
                except DomainError:
                    refused += 1
                    await asyncio.sleep(1)

        async def read(number: int) -> None:
            nonlocal reads, refused
            name = f"projects/proj_a/tuningJobs/{job_id(JOBS - 1 - number)}"
            with acting_as(OWNER):
                while True:
                    try:
                        await stub.GetTuningJob(tuning_service_pb2.GetTuningJobRequest(name=name))
                        reads += 1
                    except DomainError:
                        refused += 1
                        await asyncio.sleep(0.1)

        async with asyncio.TaskGroup() as group:
            for number in range(WATCHERS):
                group.create_task(watch(number))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(everybody.wait(), 60)
            for number in range(READS):
                group.create_task(read(number))
            print(f"watching {len(first)}", flush=True)
            while True:
                await asyncio.sleep(5)
                print(f"in 5 s: {messages} messages, {reads} reads, {refused} refused", flush=True)
                messages = reads = refused = 0


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "nats").mkdir()
        pki.main(["--dir", str(folder / "tls"), "gateway", "scheduler"])
        trainer_tls = node_tls_dir(folder / "tls", "n1")
        async with (
            running_postgres(folder) as postgres,
            running_nats(folder / "nats") as nats,
            postgres.scratch() as url,
            scheduler(url, nats.url, folder / "tls", folder) as (for_users, for_agents),
        ):
            connection = await asyncpg.connect(url)
            await fill_queue(connection)
            async with open_channel(settings_of("trainer", trainer_tls), for_agents, "scheduler") as channel:
                stub = node_service_pb2_grpc.NodeServiceStub(channel)
                registration = node_service_pb2.RegisterNodeRequest(
                    node="n1",
                    incarnation="i1",
                    address="127.0.0.1:9",
                    devices=[node_pb2.Device(index=0, hardware_type="cpu")],
                )
                await stub.RegisterNode(registration)
                heartbeat = Heartbeat(stub)
                alone = pace(await heartbeat.beats(), BEATS_S)
                moving = asyncio.create_task(move_queue(url))
                crowd = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "bench.watchers",
                    for_users,
                    str(folder / "tls"),
                    stdout=asyncio.subprocess.PIPE,
                )
                assert crowd.stdout is not None
                try:
                    print((await crowd.stdout.readline()).decode().strip(), flush=True)
                    crowded = pace(await heartbeat.beats(), BEATS_S)
                finally:
                    moving.cancel()
                    crowd.kill()
                    said = await crowd.stdout.read()
                    await crowd.wait()
            lost = await connection.fetchval("SELECT count(*) FROM nodes WHERE state <> 'READY'")
            await connection.close()
    print(said.decode().strip())
    print(machine())
    for kind, figures in (("alone", alone), ("crowded", crowded)):
        print(f"heartbeat {kind}: p50 {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.1f} ms")
    print(f"a third of the lease: {LEASE_S / 3 * 1000:.0f} ms; nodes lost: {lost}; broken streams: {heartbeat.broken}")
    print(last_line("watchers.heartbeat_p99", crowded["p99_ms"], alone["p99_ms"], "ms", "alone"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        uvloop.run(users(sys.argv[1], Path(sys.argv[2])))
    else:
        uvloop.run(main())
