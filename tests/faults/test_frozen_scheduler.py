"""One of two schedulers freezes with all its connections open: its nodes turn to the other, and no lease is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest_asyncio

from finemesh.artifacts.v1 import artifact_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.config import SchedulerSettings
from tests.contract.trainer.world import PROJECT, ROOT, AgentWorld
from tests.harness.fixtures import SettingsFactory, node_tls_dir
from tests.harness.polling import eventually
from tests.harness.scripted_scheduler import SchedulerServer, ScriptedScheduler
from tests.store.scheduler.world import fresh_world, migrated_pool

FROZEN_S = 60.0
LEASE_S = 6.0
# It never ends by itself within a test.
LONG = {"steps": 1_000_000, "checkpoint_every": 10, "step_s": 0.02}


class Replica:
    """A scheduler process on the shared database."""

    def __init__(self, name: str, settings: SchedulerSettings, folder: Path) -> None:
        self._port_file = folder / f"{name}.port"
        values = {
            "database_url": settings.database_url,
            "nats_url": settings.nats_url,
            "tls_dir": settings.tls_dir,
            "agents_port_file": self._port_file,
            "listen_address": "127.0.0.1:0",
            "agents_address": "127.0.0.1:0",
            "lease_duration_s": LEASE_S,
            "heartbeat_interval_s": 0.5,
            "log_format": "console",
        }
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
        environment |= {f"FINEMESH_SCHEDULER_{key.upper()}": str(value) for key, value in values.items()}
        log = (folder / f"{name}.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.scheduler.main"], env=environment, cwd=ROOT, stdout=log, stderr=log
        )

    async def address(self) -> str:
        return f"127.0.0.1:{int(await eventually(self._port, bool))}"

    async def _port(self) -> str:
        return self._port_file.read_text().strip() if self._port_file.exists() else ""

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


@pytest_asyncio.fixture(loop_scope="session")
async def replicas(make_settings: SettingsFactory, tmp_path: Path) -> AsyncIterator[list[Replica]]:
    base = make_settings("scheduler")
    settings = SchedulerSettings(database_url=base.database_url, nats_url=base.nats_url, tls_dir=base.tls_dir)
    with contextlib.ExitStack() as ends:
        made = []
        for name in ("one", "two"):
            made.append(Replica(name, settings, tmp_path))
            ends.callback(made[-1].end)
        yield made


async def test_a_frozen_scheduler_costs_no_lease(
    replicas: list[Replica], make_settings: SettingsFactory, tmp_path: Path, tls_dir: Path
) -> None:
    addresses = [await replica.address() for replica in replicas]
    base = make_settings("scheduler")
    unused = ScriptedScheduler()
    world = AgentWorld(scheduler=unused, server=SchedulerServer(unused, base), folder=tmp_path, tls_dir=tls_dir)
    settings = SchedulerSettings(database_url=base.database_url, tls_dir=tls_dir)
    pool = await migrated_pool(settings)
    connection = await asyncpg.connect(base.database_url)

    async def row(statement: str) -> asyncpg.Record:
        found = await connection.fetchrow(statement)
        assert found is not None
        return found

    try:
        jobs = await fresh_world(pool, settings)
        await world.start_agent(scheduler_agents_address=",".join(addresses), tls_dir=node_tls_dir(tls_dir, "local-0"))
        await eventually(lambda: row("SELECT count(*) FROM nodes"), lambda found: found[0] == 1)
        await jobs.queued_job(
            project=PROJECT,
            spec=spec(),
            training_artifact=encoded(world.script(**LONG)),
            base_artifact=base_of(world),
        )
        await connection.execute("UPDATE jobs SET wake_at = now(), queue_time = now()")
        await eventually(lambda: row("SELECT state FROM jobs"), lambda found: found[0] == "RUNNING")
        stream = (await row("SELECT heartbeat_stream FROM nodes"))[0]
        serving = (tmp_path / "agent.log").read_text().rpartition("target=")[2].split()[0]
        frozen = replicas[addresses.index(serving)].process
        frozen.send_signal(signal.SIGSTOP)
        moved = eventually(
            lambda: row("SELECT heartbeat_stream FROM nodes"), lambda found: found[0] not in (stream, None)
        )
        await asyncio.wait_for(moved, LEASE_S)
        await asyncio.sleep(FROZEN_S)
        frozen.send_signal(signal.SIGCONT)
        # It wakes to leases that it has not seen renewed; two of their lives are enough to judge wrongly.
        await asyncio.sleep(2 * LEASE_S)
        attempts = await connection.fetch("SELECT outcome FROM attempts")
        assert [attempt["outcome"] for attempt in attempts] == [None]
        found = await row("SELECT jobs.state, nodes.state AS node, progress_step FROM jobs, nodes")
        assert (found["state"], found["node"]) == ("RUNNING", "READY")
        assert found["progress_step"] > 0
    finally:
        await connection.close()
        await pool.close()
        await world.kill_agents()


def spec() -> bytes:
    wanted = tuning_job_pb2.TuningSpec(base_model="finemesh/tiny", lora=tuning_job_pb2.LoraTraining(rank=4))
    wanted.hyperparameters.epochs, wanted.hyperparameters.batch_size = 1, 1
    wanted.hyperparameters.learning_rate = 0.01
    return wanted.SerializeToString()


def encoded(artifact: artifact_pb2.Artifact) -> bytes:
    return artifact.SerializeToString(deterministic=True)


def base_of(world: AgentWorld) -> bytes:
    file = world.put("base/ml_tiny/rv_1/", b"{}", "config.json")
    return encoded(artifact_pb2.Artifact(key="base/ml_tiny/rv_1/", files=[file]))
