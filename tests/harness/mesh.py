"""The real mesh for tests: the launcher's own stack, a small real base model, a client, and jobs of a known length."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from deploy.local.stack import Stack, StackOptions
from finemesh.tuning.v1 import tuning_job_event_pb2 as events
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client import Client, find_config
from finemesh_client.billing import NANOS_PER_DOLLAR
from tests.harness.polling import eventually

BASE = "finemesh/tiny-llama"
CREDIT_NANOS_USD = 500 * NANOS_PER_DOLLAR
JOB_TIMEOUT_S = 240.0
CHILD = "services.trainer.train.main"
# Short enough that a lost node is noticed within a test, long enough that two busy cores do not lose one by themselves.
QUICK_LEASES = {"FINEMESH_SCHEDULER_LEASE_DURATION_S": "6", "FINEMESH_SCHEDULER_HEARTBEAT_INTERVAL_S": "0.5"}
# Tests kill what runs on a node again and again; who tests quarantine asks for it.
NO_QUARANTINE = {"FINEMESH_SCHEDULER_QUARANTINE_JOBS_MIN": "1000000"}
# They would load torch beside every test; who measures or tests them asks for them.
NO_WARM_CHILDREN = {"FINEMESH_TRAINER_WARM_MEMORY_BYTES_MAX": "0"}


def make_base(folder: Path, name: str = "tiny-llama") -> Path:
    """A small real base model from its recipe, kept in the user's cache between runs."""
    cache = Path.home() / ".cache" / "finemesh" / "recipes"
    command = [sys.executable, "-m", "services.trainer.train.recipes.main", "--name", name, "--out", str(folder / name)]
    subprocess.run([*command, "--cache", str(cache)], check=True, capture_output=True)
    return folder / name


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations with a rule to learn: the answer is the question's second word, said twice."""
    words = ["river", "stone", "cloud", "ember", "meadow", "harbor", "lantern", "willow", "copper", "violet"]
    rows = []
    for number in range(count):
        first, second = words[(number * 7 + seed) % 10], words[(number * 3 + seed + number // 10) % 10]
        question = f"{first} {second} number {number + seed}"
        answer = f"{second} {second}"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A running stack with an imported base model, credit, and two uploaded files."""

    stack: Stack
    client: Client
    folder: Path
    training_file: str
    validation_file: str

    def spec(self, output_name: str, **hyperparameters: Any) -> pb.TuningSpec:
        """About 60 steps with twelve checkpoints and six evaluations; short sequences, so that little is packed."""
        given = {
            "epochs": 6,
            "evaluations": 1,
            "batch_size": 6,
            "learning_rate": 1e-3,
            "checkpoint_interval_steps": 5,
            "sequence_tokens_max": 64,
        }
        return pb.TuningSpec(
            base_model=BASE,
            training_file=self.training_file,
            validation_file=self.validation_file,
            output_name=output_name,
            lora=pb.LoraTraining(rank=8),
            hyperparameters=pb.Hyperparameters(**{**given, **hyperparameters}),
        )

    async def run_job(self, output_name: str, **hyperparameters: Any) -> pb.TuningJob:
        job = await self.client.jobs.create(self.spec(output_name, **hyperparameters))
        return await self.ended(job.name)

    async def ended(self, name: str) -> pb.TuningJob:
        async with asyncio.timeout(JOB_TIMEOUT_S):
            return await self.client.jobs.wait(name)

    async def until_checkpoint(self, name: str, count: int = 2) -> int:
        """The step of the job's `count`-th committed checkpoint, as soon as it is there."""
        seen = 0
        async with asyncio.timeout(JOB_TIMEOUT_S):
            async for message in self.client.jobs.watch(name):
                seen += sum(e.kind == events.TUNING_JOB_EVENT_KIND_CHECKPOINT for e in message.events)
                if seen >= count:
                    return int(message.tuning_job.progress.step)
        raise AssertionError(f"{name} ended before its {count}. checkpoint")

    async def adapter_sha256(self, model_id: str) -> str:
        """Digest of the adapter's bytes as a user downloads them."""
        await self.until_registered(model_id)
        target = self.folder / "downloads" / model_id.replace("/", "-")
        paths = await self.client.models.download(model_id, target)
        weights = next(path for path in paths if path.name == "adapter_model.safetensors")
        return hashlib.sha256(weights.read_bytes()).hexdigest()

    async def until_registered(self, model_id: str) -> None:
        """A model comes by an event after its job has ended."""

        async def listed() -> bool:
            return model_id in [model.model_id async for model in self.client.models.list()]

        await eventually(listed)

    async def settled(self, name: str) -> object:
        """The job's charge, once billing has settled it."""
        return await eventually(partial(self.client.billing.job_charge, name), lambda charge: charge.settled)

    def training_children(self) -> dict[str, psutil.Process]:
        """The training processes by the name of their agent, each of which has one at a time."""
        found = {}
        for log in self.stack.folder.logs.glob("trainer-*.log"):
            pid = self.stack.pid(log.stem)
            if pid is None or not psutil.pid_exists(pid):
                continue
            for child in psutil.Process(pid).children(recursive=True):
                try:
                    if CHILD in " ".join(child.cmdline()):
                        found[log.stem] = child
                except psutil.Error:
                    continue
        return found

    async def until_nobody_trains(self) -> None:
        """A job is over when its leading process said so; those that followed it end a moment later."""
        _, alive = await asyncio.to_thread(psutil.wait_procs, list(self.training_children().values()), 60)
        assert not alive

    async def rows(self, service: str, statement: str, *values: object) -> list[asyncpg.Record]:
        """What a statement finds in the tables of one service, which no API shows."""
        environment = self.stack.environment(service)
        connection = await asyncpg.connect(environment[f"FINEMESH_{service.upper()}_DATABASE_URL"])
        try:
            return list(await connection.fetch(statement, *values))
        finally:
            await connection.close()


@asynccontextmanager
async def running_mesh(
    folder: Path, *, engine: str = "stub", nodes: int = 1, credit_nanos_usd: int = CREDIT_NANOS_USD, **environment: str
) -> AsyncIterator[Mesh]:
    """Everything up, imported, topped up and uploaded; all gone after."""
    base = await asyncio.to_thread(make_base, folder)
    options = StackOptions(
        data=folder / "data",
        engine=engine,
        nodes=nodes,
        environment={**QUICK_LEASES, **NO_QUARANTINE, **NO_WARM_CHILDREN, **environment},
    )
    async with Stack(options) as stack, Client(find_config(data_dir=folder / "data")) as client:
        # Its template knows no tools: what reads calls has to be said.
        await client.models.import_base(BASE, base, tool_parser="hermes")
        await client.billing.top_up(credit_nanos_usd, request_id="tests")
        training = await client.files.upload(write_rows(folder / "train.jsonl", make_rows(160)))
        validation = await client.files.upload(write_rows(folder / "held-out.jsonl", make_rows(40, seed=1000)))
        yield Mesh(
            stack=stack,
            client=client,
            folder=folder,
            training_file=training.name,
            validation_file=validation.name,
        )
