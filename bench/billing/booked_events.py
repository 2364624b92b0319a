"""Usage from publish to rated, posted and settled, with every guarantee on, beside a raw COPY of the same rows.

Ours: a meter process writes batched messages to its outbox, a relay publishes them to a synced JetStream, and the real
billing daemon books them (inbox, prices, hash chain, postings, sums, settlements). A record is a row of
`usage_records`; a served call makes two. The peer loads the same rows, ready in memory, into a table with one index.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.billing.stage import Stage, stage
from bench.billing.usage_source import ORGANIZATIONS, STEP_TOKENS, USAGES_PER_JOB, job, organization, project
from bench.report import last_line, machine, spread
from chassis.identity import Caller, acting_as
from chassis.rpc.channel import open_channel
from finemesh.billing.v1 import billing_service_pb2, billing_service_pb2_grpc
from finemesh.holds.v1 import hold_service_pb2, hold_service_pb2_grpc
from services.inference.config import InferenceSettings

ROUNDS = 3
EVENTS = 200
JOBS = 10
PACED_S = 10
POLL_S = 0.01
DONE_S_MAX = 300
CALLS = InferenceSettings().usage_batch_max


@dataclass(frozen=True, kw_only=True)
class Round:
    records: int
    took_s: float
    # Seconds from the commit of an event to its booking, of every event that was seen.
    lags_s: list[float]

    @property
    def per_s(self) -> float:
        return self.records / self.took_s


async def hold_jobs(on: Stage, round_number: int) -> None:
    """Credit, and the holds that this round's jobs settle."""
    gateway = open_channel(on.settings("gateway"), on.address, "billing")
    scheduler = open_channel(on.settings("scheduler"), on.address, "billing")
    billing = billing_service_pb2_grpc.BillingServiceStub(gateway)
    holds = hold_service_pb2_grpc.HoldServiceStub(scheduler)
    for number in range(ORGANIZATIONS):
        with acting_as(Caller(service="gateway", account=organization(number), roles=frozenset({"operator"}))):
            await billing.TopUp(
                billing_service_pb2.TopUpRequest(amount_nanos_usd=10**15, request_id=f"round-{round_number}"),
                timeout=10,
            )
    for number in range(JOBS):
        price = billing_service_pb2.EstimatePriceRequest(
            base_model="meta-llama/Llama-3.1-8B", training_tokens=STEP_TOKENS * USAGES_PER_JOB, epochs=1
        )
        await holds.CreateHold(
            hold_service_pb2.CreateHoldRequest(
                resource=job(number, round_number),
                organization_id=organization(number % ORGANIZATIONS),
                project_id=project(number % ORGANIZATIONS),
                price=price,
            ),
            timeout=10,
        )
    await gateway.close()
    await scheduler.close()


async def run_round(on: Stage, round_number: int, events: int, events_per_s: float = 0.0) -> Round:
    """From the first commit of the meter until the last record is booked and the last job settled."""
    await hold_jobs(on, round_number)
    before = await on.pool.fetchval("SELECT coalesce(sum(record_count), 0)::bigint FROM usage_sums")
    plan = {
        "database_url": on.meter_url,
        "nats_url": on.nats.url,
        "tls_dir": str(on.tls_dir),
        "events": events,
        "calls": CALLS,
        "jobs": JOBS,
        "round": round_number,
        "events_per_s": events_per_s,
    }
    meter = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.billing.usage_source", json.dumps(plan), stdout=asyncio.subprocess.PIPE
    )
    records = events * CALLS * 2 + JOBS * USAGES_PER_JOB
    booked_at: dict[str, float] = {}
    done = 0.0
    output = asyncio.create_task(meter.communicate())
    async with asyncio.timeout(DONE_S_MAX):
        while not done:
            await asyncio.sleep(POLL_S)
            row = await on.pool.fetchrow(
                "SELECT (SELECT coalesce(sum(record_count), 0)::bigint FROM usage_sums) AS records,"
                " EXISTS (SELECT FROM holds WHERE state = 'held') AS unsettled,"
                " ARRAY(SELECT event_id::text FROM inbox WHERE handled_at > now() - interval '2 seconds') AS handled"
            )
            assert row is not None
            now = time.time()
            for event_id in row["handled"]:
                booked_at.setdefault(event_id, now)
            if row["records"] - before == records and not row["unsettled"]:
                done = now
            assert meter.returncode in (None, 0), "the meter failed"
    told = json.loads((await output)[0].splitlines()[-1])
    lags = [booked_at[key] - moment for key, moment in told["committed"].items() if key in booked_at]
    assert len(lags) > 0.9 * len(told["committed"]), "the observer missed events"
    return Round(records=records, took_s=done - told["began"], lags_s=sorted(lags))


async def copy_again(on: Stage, rows: int) -> float:
    """Rows per second of COPY into a fresh table with the same columns and one unique index."""
    async with on.pool.acquire() as connection:
        buffer = io.BytesIO()
        await connection.copy_from_query("SELECT * FROM usage_records LIMIT $1", rows, output=buffer, timeout=300)
        await connection.execute("DROP TABLE IF EXISTS copied")
        await connection.execute("CREATE TABLE copied AS SELECT * FROM usage_records LIMIT 0")
        await connection.execute("CREATE UNIQUE INDEX ON copied (project_id, work_key)")
        buffer.seek(0)
        began = time.perf_counter()
        await connection.copy_to_table("copied", source=buffer, timeout=300)
        took_s = time.perf_counter() - began
        await connection.execute("DROP TABLE copied")
    return rows / took_s


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        async with stage(Path(name)) as on:
            await run_round(on, 0, EVENTS // 10)
            ours: list[float] = []
            peer: list[float] = []
            for number in range(1, ROUNDS + 1):
                done = await run_round(on, number, EVENTS)
                ours.append(done.per_s)
                peer.append(await copy_again(on, done.records))
                print(f"round {number}: ours {ours[-1]:.0f} records/s, COPY {peer[-1]:.0f} rows/s", flush=True)
            pace = median(ours) / 2 / (CALLS * 2)
            paced = await run_round(on, ROUNDS + 1, int(pace * PACED_S), pace)
            letters = await on.pool.fetchval("SELECT count(*) FROM dead_letters")
            assert letters == 0, f"{letters} events were set aside"
    p50, p99 = (paced.lags_s[int(len(paced.lags_s) * share)] * 1000 for share in (0.5, 0.99))
    print(
        f"on {machine()}; {CALLS} calls of two records in a message, {JOBS} jobs settled in each round;"
        f" ours {spread(ours)} records/s, COPY {spread(peer)} rows/s"
    )
    print(
        f"at {pace * CALLS * 2:.0f} records/s from commit in the meter's outbox to commit in the ledger:"
        f" p50 {p50:.0f} ms, p99 {p99:.0f} ms"
    )
    print(last_line("billing.events", median(ours), median(peer), "records/s", "COPY"))


if __name__ == "__main__":
    asyncio.run(main())
