"""GetTuningJob through gateway and scheduler with everything on, beside a bare grpc.aio echo of the same bytes.

Run it: `make bench-edge`. Both sides get the same load generator in a process of its own; rounds are interleaved. Ours
pays for two hops, mutual TLS inside, authentication, rate limit, tracing, error packing, deadlines and one SQL query.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.echo_server import METHOD
from bench.report import last_line, machine
from finemesh.tuning.v1 import tuning_service_pb2
from tests.harness.mesh import running_mesh

ROUNDS = 5
CALLS = 4000
CONCURRENCY = 32
OURS = "/finemesh.tuning.v1.TuningService/GetTuningJob"


async def load(address: str, method: str, request: bytes, key: str = "") -> dict[str, float]:
    """One round of load from a process of its own."""
    arguments = [address, method, request.hex(), str(CALLS), str(CONCURRENCY), *([key] if key else [])]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.load", *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the load generator failed with exit code {process.returncode}")
    measured: dict[str, float] = json.loads(output)
    return measured


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        async with running_mesh(Path(name)) as mesh:
            job = await mesh.run_job("measured", epochs=1)
            request = tuning_service_pb2.GetTuningJobRequest(name=job.name).SerializeToString()
            answer = tuning_service_pb2.GetTuningJobResponse(tuning_job=job).SerializeToString()
            echo = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "bench.echo_server",
                answer.hex(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert echo.stdout is not None
            assert echo.stdin is not None
            bare_address = f"127.0.0.1:{int(await echo.stdout.readline())}"
            config = mesh.client.config
            ours: list[dict[str, float]] = []
            bare: list[dict[str, float]] = []
            for number in range(ROUNDS + 1):
                ours.append(await load(config.address, OURS, request, config.api_key))
                bare.append(await load(bare_address, METHOD, request))
                if number == 0:  # The first round warms both sides up.
                    ours.clear()
                    bare.clear()
                    continue
                print(f"round {number}: ours {ours[-1]}, bare {bare[-1]}", flush=True)
            echo.stdin.close()
            await echo.wait()
    print(f"on {machine()}; {CONCURRENCY} calls in flight, answer of {len(answer)} bytes")
    for side, rounds in (("ours", ours), ("bare echo", bare)):
        p50, p99 = (median(r[key] for r in rounds) for key in ("p50_ms", "p99_ms"))
        print(f"{side}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    rates = (median(r["calls_per_s"] for r in ours), median(r["calls_per_s"] for r in bare))
    print(last_line("edge.get", *rates, "calls/s", "bare echo"))


if __name__ == "__main__":
    asyncio.run(main())
