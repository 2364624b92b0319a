"""How long the whole mesh takes to become healthy, beside PostgreSQL and nats-server alone, and how long a job waits to
learn: on a node whose child waits with torch loaded, beside one that starts a child for each job.

Run it: `make bench-start`. Caches are warm: each side's data folder was started once before; engines are not started.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.report import last_line, machine, spread
from deploy.local.stack import Stack, StackOptions
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from tests.harness.mesh import running_mesh

ROUNDS = 5
FIRST_STEP_ROUNDS = 3
COLD_NODE: dict[str, str] = {}
WARM_NODE = {"FINEMESH_TRAINER_WARM_MEMORY_BYTES_MAX": str(4 * 1024**3)}
LOOK_S = 0.1
WARM_LOOKS_MAX = 1200


async def start_seconds(options: StackOptions) -> float:
    """From nothing running to everything healthy, then down again."""
    stack = Stack(options)
    began = time.perf_counter()
    await stack.start()
    took_s = time.perf_counter() - began
    await stack.stop()
    return took_s


async def first_step_seconds(folder: Path, node: dict[str, Any]) -> tuple[list[float], list[float]]:
    """To the report of a job's first training step, for some jobs one after the other: from a job's creation, with
    analysis, hold and placement, and from its lease."""
    since_creation: list[float] = []
    since_lease: list[float] = []
    async with running_mesh(folder, **node) as mesh:
        for number in range(FIRST_STEP_ROUNDS):
            if node == WARM_NODE:
                await asyncio.to_thread(wait_until_warm, mesh.stack.folder.logs, number + 1)
            began = time.perf_counter()
            leased = began
            job = await mesh.client.jobs.create(mesh.spec(f"first-step-{number}"))
            async for message in mesh.client.jobs.watch(job.name):
                now = time.perf_counter()
                if message.tuning_job.state == pb.TUNING_JOB_STATE_FAILED:
                    raise RuntimeError(message.tuning_job.error.message)
                if message.tuning_job.state == pb.TUNING_JOB_STATE_STARTING and leased == began:
                    leased = now
                if message.tuning_job.progress.step >= 1 and len(since_lease) == number:
                    since_creation.append(now - began)
                    since_lease.append(now - leased)
    if len(since_lease) < FIRST_STEP_ROUNDS:
        raise RuntimeError("a job ended without a step")
    return since_creation, since_lease


def wait_until_warm(logs: Path, count: int) -> None:
    """Until the trainer's log has said so many times that a child waits."""
    for _ in range(WARM_LOOKS_MAX):
        if sum(log.read_text().count("warm_child_ready") for log in logs.glob("trainer-*.log")) >= count:
            return
        time.sleep(LOOK_S)
    raise TimeoutError("no child became warm")


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = StackOptions(data=folder / "ours", engine="stub")
        bare = StackOptions(data=folder / "bare", services=())
        sides: dict[str, list[float]] = {"ours": [], "bare": []}
        for options in (ours, bare):
            await start_seconds(options)
        for number in range(ROUNDS):
            for side, options in (("ours", ours), ("bare", bare)):
                sides[side].append(await start_seconds(options))
            print(f"round {number + 1}: ours {sides['ours'][-1]:.2f} s, bare {sides['bare'][-1]:.2f} s", flush=True)
        cold = await first_step_seconds(folder / "cold", COLD_NODE)
        warm = await first_step_seconds(folder / "warm", WARM_NODE)
        for name, (since_creation, since_lease) in (("cold", cold), ("warm", warm)):
            print(
                f"{name} child, to the first step: {spread(since_creation)} s from creation, "
                f"{spread(since_lease)} s from the lease"
            )
        print(
            f"on {machine()}; ours {spread(sides['ours'])} s, bare postgres and nats-server {spread(sides['bare'])} s"
        )
        print(last_line("start.first_step", median(warm[1]), median(cold[1]), "s", "cold child"))
        print(last_line("start.stack", median(sides["ours"]), median(sides["bare"]), "s", "bare"))


if __name__ == "__main__":
    asyncio.run(main())
