"""The crowd of a soak: organizations with credit, a file each, and jobs that wait in the queue. Not pure: the API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client import Client
from finemesh_client.config import ClientConfig
from tests.harness.mesh import BASE
from tests.harness.organizations import Tenant, add_organization

AT_ONCE = 16
CREDIT_NANOS_USD = 1_000_000 * 10**9
# A job takes as many steps as its file has lines, so that some end while the others wait.
STEPS, STEP_S = 12, 5.0


@dataclass(frozen=True, kw_only=True)
class Member:
    """An organization of the crowd; `client` is open while the soak lasts."""

    tenant: Tenant
    client: Client
    file: str

    def spec(self, number: int) -> pb.TuningSpec:
        hyperparameters = pb.Hyperparameters(epochs=1, batch_size=8, learning_rate=1e-3)
        return pb.TuningSpec(
            base_model=BASE,
            training_file=self.file,
            output_name=f"soaked-{number}",
            lora=pb.LoraTraining(rank=8),
            hyperparameters=hyperparameters,
        )


async def gather_crowd(database_url: str, address: str, folder: Path, count: int) -> list[Member]:
    """`count` organizations, each with credit and an uploaded file."""
    path = folder / "soak.jsonl"
    said = json.dumps({"step_s": STEP_S})
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "yes"}]}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(STEPS)))

    async def join(number: int) -> Member:
        tenant = await add_organization(database_url, f"crowd-{number}")
        client = Client(ClientConfig(address=address, api_key=tenant.api_key, timeout_s=60.0))
        await client.billing.top_up(CREDIT_NANOS_USD, request_id="crowd")
        return Member(tenant=tenant, client=client, file=(await client.files.upload(path)).name)

    members: list[Member | None] = [None] * count

    async def fill(number: int) -> None:
        members[number] = await join(number)

    await at_once(fill, range(count))
    return [member for member in members if member is not None]


async def queue_jobs(crowd: Sequence[Member], numbers: Sequence[int]) -> None:
    """A job for each number, taken by the members in turn."""

    async def create(number: int) -> None:
        member = crowd[number % len(crowd)]
        await member.client.jobs.create(member.spec(number), request_id=f"soak-{number}")

    await at_once(create, numbers)


async def at_once(work: Callable[[int], Awaitable[None]], numbers: Sequence[int]) -> None:
    """All of them, a few at a time."""
    waiting = iter(numbers)

    async def worker() -> None:
        for number in waiting:
            await work(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(worker())
