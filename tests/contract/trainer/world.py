"""Builds assignments over a folder that stands for the artifact store, and starts agents as the processes
that they are."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from chassis import pki
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2
from tests.harness.scripted_scheduler import WAIT_S_MAX, SchedulerServer, ScriptedScheduler

ROOT = Path(__file__).parents[3]
PROJECT = "proj_1"


@dataclass
class AgentWorld:
    scheduler: ScriptedScheduler
    server: SchedulerServer
    folder: Path
    tls_dir: Path
    agents: list[asyncio.subprocess.Process] = field(default_factory=list)

    @property
    def store(self) -> Path:
        return self.folder / "artifacts"

    @property
    def work(self) -> Path:
        return self.folder / "data" / "trainer" / "local-0" / "work"

    @property
    def port_file(self) -> Path:
        return self.folder / "port"

    async def start_agent(self, **settings: Any) -> asyncio.subprocess.Process:
        given = {
            "scheduler_agents_address": self.server.address,
            "artifacts_url": self.store.as_uri(),
            "data_dir": self.folder / "data",
            "tls_dir": self.tls_dir,
            "child_module": "tests.harness.fake_child",
            "warm_memory_bytes_max": 0,
            "report_interval_s": 0.02,
            "report_backoff_s_max": 0.2,
            "drain_grace_s": 30,
            "port_file": self.port_file,
            "log_format": "console",
            **settings,
        }
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}:{self.folder}"}
        environment |= {f"FINEMESH_TRAINER_{name.upper()}": str(value) for name, value in given.items()}
        log = (self.folder / "agent.log").open("ab")
        agent = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.trainer.main"), env=environment, cwd=ROOT, stdout=log, stderr=log
        )
        self.agents.append(agent)
        return agent

    async def kill_agents(self) -> None:
        for agent in self.agents:
            if agent.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    agent.send_signal(signal.SIGKILL)
                await agent.wait()

    def put(self, key: str, content: bytes, path: str = "") -> artifact_pb2.ArtifactFile:
        target = self.store / key / path if path else self.store / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return artifact_pb2.ArtifactFile(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def put_folder(self, key: str, folder: Path) -> artifact_pb2.Artifact:
        files = [
            self.put(key, path.read_bytes(), path.relative_to(folder).as_posix())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        return artifact_pb2.Artifact(key=key, files=files)

    def script(self, **script: Any) -> artifact_pb2.Artifact:
        key = f"files/{PROJECT}/file-{len(list(self.folder.rglob('file-*')))}"
        script.setdefault("pid_file", str(self.folder / "pids"))
        return artifact_pb2.Artifact(key=key, files=[self.put(key, json.dumps(script).encode())])

    def assignment(
        self, training_file: artifact_pb2.Artifact, *, token: int = 7, job: str = "ft-1", **fields: Any
    ) -> node_pb2.Assignment:
        base = artifact_pb2.Artifact(
            key="base/ml_tiny/rv_1/", files=[self.put("base/ml_tiny/rv_1/", b"{}", "config.json")]
        )
        assignment = node_pb2.Assignment(
            desired_state=node_pb2.DESIRED_STATE_RUN,
            base_model=base,
            base_revision="rv_1",
            training_file=training_file,
            device_indices=[0],
            checkpoint_key_prefix=f"jobs/{PROJECT}/{job}/checkpoints/",
            model_key_prefix=f"jobs/{PROJECT}/{job}/models/",
            **fields,
        )
        assignment.lease.token = token
        assignment.lease.tuning_job = f"projects/{PROJECT}/tuningJobs/{job}"
        assignment.lease.attempt = 1
        assignment.spec.base_model = "finemesh/tiny"
        assignment.spec.lora.rank = 4
        hyper = assignment.spec.hyperparameters
        hyper.epochs, hyper.batch_size, hyper.learning_rate = 1, 1, 0.01
        return assignment

    def children(self) -> list[tuple[int, Path]]:
        """Pid and work folder of every child so far."""
        pids = self.folder / "pids"
        lines = pids.read_text().splitlines() if pids.exists() else []
        return [(int(line.split(" ", 1)[0]), Path(line.split(" ", 1)[1])) for line in lines]

    async def wait_for_child(self, count: int = 1) -> int:
        await eventually(lambda: len(self.children()) >= count)
        return self.children()[count - 1][0]

    def stored(self, prefix: str) -> list[str]:
        root = self.store / prefix
        return sorted(path.relative_to(self.store).as_posix() for path in root.rglob("*") if path.is_file())

    @contextlib.asynccontextmanager
    async def channel(self, service: str = "scheduler") -> AsyncIterator[grpc.aio.Channel]:
        """A raw channel to the agent's own server, as `service`."""
        await eventually(self.port_file.exists)
        credentials = pki.load(self.tls_dir, service).for_channel()
        options = [("grpc.ssl_target_name_override", "trainer")]
        address = f"127.0.0.1:{int(self.port_file.read_text())}"
        async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
            yield channel


def is_alive(pid: int) -> bool:
    """A zombie is dead: nobody has read its exit code yet, that is all."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def wait_for_death(pid: int, timeout_s: float = WAIT_S_MAX) -> None:
    await eventually(lambda: not is_alive(pid), timeout_s)


async def eventually(condition: Callable[[], bool], timeout_s: float = WAIT_S_MAX) -> None:
    """For what other processes do to files and to one another: nothing here can tell us of it."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
