"""Quote-and-hold calls from many clients, in a process of its own, with the scheduler's certificate.

`python -m bench.billing.hold_load PLAN` prints JSON with calls/s and latencies in ms.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import uvloop

from bench.report import pace
from chassis.rpc.channel import open_channel
from chassis.settings import ChassisSettings
from finemesh.billing.v1 import billing_service_pb2
from finemesh.holds.v1 import hold_service_pb2, hold_service_pb2_grpc


def request(round_number: int, number: int, organizations: int) -> hold_service_pb2.CreateHoldRequest:
    """A small job of one of the organizations."""
    owner = number % organizations
    return hold_service_pb2.CreateHoldRequest(
        resource=f"projects/proj_{owner}/tuningJobs/ft-{round_number}-{number}",
        organization_id=f"org_{owner}",
        project_id=f"proj_{owner}",
        price=billing_service_pb2.EstimatePriceRequest(
            base_model="meta-llama/Llama-3.1-8B", training_tokens=1000, epochs=1
        ),
        api_key_id=f"key_{owner}",
    )


async def run(plan: dict[str, int], address: str, settings: ChassisSettings) -> dict[str, float]:
    """Keeps `clients` calls in flight until `calls` are answered."""
    channel = open_channel(settings, address, "billing")
    holds = hold_service_pb2_grpc.HoldServiceStub(channel)
    numbers = iter(range(plan["calls"]))
    latencies: list[float] = []

    async def client() -> None:
        for number in numbers:
            asked = time.perf_counter()
            await holds.CreateHold(request(plan["round"], number, plan["organizations"]), timeout=30)
            latencies.append(time.perf_counter() - asked)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(plan["clients"])))
    took_s = time.perf_counter() - began
    await channel.close()
    return pace(latencies, took_s)


if __name__ == "__main__":
    PLAN = json.loads(sys.argv[1])
    ADDRESS = PLAN.pop("address")
    SETTINGS = ChassisSettings(service_name="scheduler", tls_dir=Path(PLAN.pop("tls_dir")))
    print(json.dumps(uvloop.run(run(PLAN, ADDRESS, SETTINGS))))
