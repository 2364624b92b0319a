"""`python -m bench.soak --minutes 10`: a mesh on this machine under 200 organizations, 2,000 queued jobs, 500 chats in
flight and 1,000 usage events a second.

Prints a line of figures at a time and a verdict at the end: exit status 1 when memory, tables or streams grow, readers
fall behind, or a lease is lost. Retentions are short, so that ten minutes show what a year does. Training is fake and
the engine is the stub.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path

import uvloop

from bench.report import last_line, machine
from bench.soak.crowd import Member, gather_crowd, queue_jobs
from bench.soak.flatness import MIB, percentile
from bench.soak.gauges import Gauges, Sample
from bench.soak.soak_verdict import tables_of, verdict
from bench.soak.traffic import (
    Figures,
    beat_for_ever,
    chat_for_ever,
    read_for_ever,
    use_for_ever,
)
from deploy.local.stack import Stack, StackOptions
from finemesh_client import Client, find_config
from tests.harness.mesh import BASE, NO_WARM_CHILDREN, make_base
from tests.harness.polling import eventually
from tests.storm.witness import FOLDER

IDLE_S = 20.0
SAMPLE_S = 10.0
QUEUED_S_MAX = 900.0
NODES, NODE = 2, "listening-0"
KEPT = {
    **NO_WARM_CHILDREN,
    "FINEMESH_TRAINER_CHILD_MODULE": "tests.storm.storm_child",
    "FINEMESH_TRAINER_ANALYSIS_MODULE": "tests.storm.storm_analysis",
    "FINEMESH_INFERENCE_STUB_TOKEN_S": "1.0",
    "FINEMESH_INFERENCE_SEQUENCES_MAX": "1000",
    "FINEMESH_INFERENCE_QUEUE_REQUESTS_MAX": "2000",
    "FINEMESH_CONCURRENT_CALLS_MAX": "3000",
    # Seconds instead of days.
    "FINEMESH_OUTBOX_RETENTION_S": "20",
    "FINEMESH_INBOX_RETENTION_S": "40",
    "FINEMESH_PRUNE_INTERVAL_S": "5",
    "FINEMESH_STREAM_LOOK_INTERVAL_S": "2",
    "FINEMESH_STREAM_SIZE_BYTES_MAX": str(32 * MIB),
    "FINEMESH_SCHEDULER_METRIC_RETENTION_S": "30",
    "FINEMESH_SCHEDULER_HISTORY_INTERVAL_S": "5",
}


async def main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="finemesh-soak-") as name:
        folder = Path(name)
        base = await asyncio.to_thread(make_base, folder)
        (folder / "data" / FOLDER).mkdir(parents=True)
        stack_options = StackOptions(data=folder / "data", engine="stub", nodes=NODES, environment=KEPT)
        async with Stack(stack_options) as stack, Client(find_config(data_dir=folder / "data")) as operator:
            await operator.models.import_base(BASE, base)
            return await soak(stack, operator, folder, options)


async def soak(stack: Stack, operator: Client, folder: Path, options: argparse.Namespace) -> int:
    url = stack.environment("gateway")["FINEMESH_GATEWAY_DATABASE_URL"]
    began = time.monotonic()
    crowd = await gather_crowd(url, operator.config.address, folder, options.organizations)
    print(f"{len(crowd)} organizations after {time.monotonic() - began:.0f} s", flush=True)
    idle = Figures()
    await for_a_while(IDLE_S, read_for_ever(crowd, idle), beat_for_ever(stack, NODE, idle))
    await queue_jobs(crowd, range(options.jobs))
    print(f"{options.jobs} jobs created after {time.monotonic() - began:.0f} s", flush=True)
    gauges = Gauges(stack=stack)
    await eventually(gauges.validating, lambda count: count == 0, within_s=QUEUED_S_MAX)
    print(f"all of them analysed, held and queued after {time.monotonic() - began:.0f} s", flush=True)
    samples: list[Sample] = []
    busy = Figures()
    await for_a_while(
        options.minutes * 60,
        *(chat_for_ever(crowd[number % len(crowd)], number, busy) for number in range(options.chats)),
        read_for_ever(crowd, busy),
        beat_for_ever(stack, NODE, busy),
        use_for_ever(stack, crowd, options.rate, busy),
        look_for_ever(gauges, crowd, options.jobs, samples, busy),
    )
    print("\n".join(tables_of(samples)))
    print(
        f"on {machine()}: {busy.counts['chats']} chats, {busy.counts['usage events']} usage events"
        f" ({busy.counts['usage events'] / (options.minutes * 60):.0f}/s of {options.rate:g}/s asked for),"
        f" failures {dict(busy.failures) or 'none'}"
    )
    for figures, when in ((idle, "idle"), (busy, "busy")):
        read, beat = percentile(figures.read_s, 0.99) * 1000, percentile(figures.beat_s, 0.99) * 1000
        reads, beats = len(figures.read_s), len(figures.beat_s)
        print(f"{when}: p99 of {reads} reads {read:.1f} ms, of {beats} heartbeats {beat:.1f} ms")
    found = verdict(samples, busy, rate=options.rate)
    print("not flat:" if found else "flat: memory, tables, streams, lag; no lease lost", *found, sep="\n  ")
    for name, ours, bare in (("read", busy.read_s, idle.read_s), ("heartbeat", busy.beat_s, idle.beat_s)):
        print(last_line(f"soak.{name}_p99", percentile(ours, 0.99) * 1000, percentile(bare, 0.99) * 1000, "ms", "idle"))
    return 1 if found else 0


async def look_for_ever(
    gauges: Gauges, crowd: list[Member], jobs: int, samples: list[Sample], figures: Figures
) -> None:
    """A sample at a time, each with a line; jobs that ended are made up for."""
    created = jobs
    while True:
        sample = await gauges.sample()
        samples.append(sample)
        memory = sum(sample.memory_bytes.values()) / MIB
        print(
            f"{sample.at_s:6.0f} s: memory {memory:.0f} MiB, tables {sum(sample.table_bytes.values()) / MIB:.0f} MiB,"
            f" streams {sum(sample.stream_bytes.values()) / MIB:.1f} MiB, unread {sum(sample.unread.values())},"
            f" unpublished {sample.unpublished}, queued {sample.queued_jobs}, leases lost {sample.leases_lost},"
            f" usage {figures.counts['usage events']} sent {figures.usage_behind_s:.1f} s behind,"
            f" {sample.usage_records} records, chats {figures.counts['chats']}",
            flush=True,
        )
        missing = max(0, jobs - NODES - sample.queued_jobs)
        await queue_jobs(crowd, range(created, created + missing))
        created += missing
        await asyncio.sleep(SAMPLE_S)


async def for_a_while(seconds: float, *works: Coroutine[object, object, None]) -> None:
    """Everything side by side; the first failure ends all."""
    try:
        async with asyncio.timeout(seconds):
            async with asyncio.TaskGroup() as group:
                for work in works:
                    group.create_task(work)
    except TimeoutError:
        return


if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    PARSER.add_argument("--minutes", type=float, default=10.0)
    PARSER.add_argument("--organizations", type=int, default=200)
    PARSER.add_argument("--jobs", type=int, default=2000)
    PARSER.add_argument("--chats", type=int, default=500)
    PARSER.add_argument("--rate", type=float, default=1000.0, help="usage events a second")
    sys.exit(uvloop.run(main(PARSER.parse_args())))
