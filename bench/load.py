"""A load generator for one unary method over raw bytes, in a process of its own;
the same for every side of a benchmark.

`python -m bench.load ADDRESS METHOD REQUEST_HEX CALLS CONCURRENCY [KEY]` prints JSON with calls/s and latencies in ms.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import grpc
import uvloop

from bench.report import pace


async def run(address: str, method: str, request: bytes, calls: int, concurrency: int, key: str) -> dict[str, float]:
    """Keeps `concurrency` calls in flight until `calls` are answered."""
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    latencies: list[float] = []
    left = calls
    async with grpc.aio.insecure_channel(address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)

        async def caller() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                began = time.perf_counter()
                await call(request, metadata=metadata, timeout=30)
                latencies.append(time.perf_counter() - began)

        await call(request, metadata=metadata, timeout=30, wait_for_ready=True)
        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(concurrency)))
        took_s = time.perf_counter() - began
    return pace(latencies, took_s)


if __name__ == "__main__":
    ADDRESS, METHOD, REQUEST, CALLS, CONCURRENCY, *KEY = sys.argv[1:]
    DONE = run(ADDRESS, METHOD, bytes.fromhex(REQUEST), int(CALLS), int(CONCURRENCY), KEY[0] if KEY else "")
    print(json.dumps(uvloop.run(DONE)))
