"""Quote-and-hold calls of 64 clients, beside pgbench running the same statements as bare SQL.

Ours: the real daemon over mutual TLS, with prices, caps, credit review, hash chain and every check of the database. The
peer sends the very statements of one call, taken from billing's query files, in one transaction, from 64 connections:
no prices, no hashes, no messages. Both hold for the same number of organizations in the same database.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.billing.stage import Stage, stage
from bench.report import last_line, machine, spread
from chassis.identity import Caller, acting_as
from chassis.rpc.channel import open_channel
from deploy.local.postgres_programs import programs
from finemesh.billing.v1 import billing_service_pb2, billing_service_pb2_grpc
from services.billing.config import MIGRATIONS

ROUNDS = 3
CLIENTS = 64
CALLS = 3000
PEER_S = 8
ORGANIZATIONS = 16
ROOMS = MIGRATIONS.parent

# What one call sends, in its order; each parameter as an expression of pgbench's variables o (organization) and n.
RESOURCE = "('projects/bare_' || :o::text || '/tuningJobs/ft-' || :n::text)"
OWNER = "('bare_' || :o::text)"
STATEMENTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("lock_job", {"resource": RESOURCE}),
    ("get_hold", {"resource": RESOURCE}),
    ("get_job_ending", {"resource": RESOURCE}),
    ("lock_chains", {"organization_ids": f"ARRAY[{OWNER}]"}),
    ("list_balances", {"organization_ids": f"ARRAY[{OWNER}]"}),
    ("get_leased", {"organization_id": OWNER, "project_id": OWNER, "api_key_id": "''", "late_s": "86400"}),
    (
        "list_budgets",
        {
            "organization_ids": f"ARRAY[{OWNER}]",
            "project_ids": f"ARRAY[{OWNER}]",
            "api_key_ids": "ARRAY['']",
            "month": "'2026-11-01'",
        },
    ),
    (
        "insert_hold",
        {
            "resource": RESOURCE,
            "id": RESOURCE,
            "organization_id": OWNER,
            "project_id": OWNER,
            "base_model": "'meta-llama/Llama-3.1-8B'",
            "method": "'sft_lora'",
            "training_tokens": "1000",
            "validation_tokens": "0",
            "epochs": "1",
            "evaluations": "0",
            "parameter_count": "0",
            "price_book_version": "'default-2026-1'",
            "held_nanos_usd": "5000000000",
            "hold_time": "now()",
            "expire_time": "now()",
            "api_key_id": "''",
        },
    ),
    (
        "insert_transactions",
        {
            "ids": "ARRAY[gen_random_uuid()]",
            "kinds": "ARRAY['hold']",
            "organization_ids": f"ARRAY[{OWNER}]",
            "resources": f"ARRAY[{RESOURCE}]",
            "price_book_versions": "ARRAY['default-2026-1']",
            "transaction_times": "ARRAY[now()]",
            "positions": "ARRAY[:position + 1]",
            "hashes": "ARRAY[sha256('x')]",
        },
    ),
    (
        "insert_postings",
        {
            "organization_ids": f"ARRAY[{OWNER}, {OWNER}]",
            "positions": "ARRAY[:position + 1, :position + 1]",
            "accounts": "ARRAY['held', 'prepaid']",
            "amounts": "ARRAY[5000000000, -5000000000]",
        },
    ),
    ("list_credit", {"organization_ids": f"ARRAY[{OWNER}]"}),
)
_PARAMETER = re.compile(r"(?<!:):([a-z_]+)")
_TPS = re.compile(r"tps = ([0-9.]+)")


def statement(name: str, values: dict[str, str]) -> str:
    """One query of billing's files with pgbench's expressions for its parameters; the lock's row becomes variables."""
    for file in sorted(ROOMS.rglob("queries.sql")):
        for block in re.split(r"(?m)^-- name: ", file.read_text(encoding="utf-8"))[1:]:
            if re.match(rf"{name}\b", block):
                lines = [line for line in block.splitlines()[1:] if not line.startswith("--")]
                sql = _PARAMETER.sub(lambda found: values[found.group(1)], "\n".join(lines)).strip()
                # The position that the lock read is a variable of what follows.
                return sql.removesuffix(";") + "\n\\gset\n" if name == "lock_chains" else sql + "\n"
    raise LookupError(f"no query {name}")


def script() -> str:
    body = "".join(statement(name, values) for name, values in STATEMENTS)
    return f"\\set o random(0, {ORGANIZATIONS - 1})\n\\set n random(1, 1000000000000000)\nBEGIN;\n{body}COMMIT;\n"


async def pay_in(on: Stage) -> None:
    """Credit for both sides that never ends."""
    channel = open_channel(on.settings("gateway"), on.address, "billing")
    billing = billing_service_pb2_grpc.BillingServiceStub(channel)
    for number in range(ORGANIZATIONS):
        for name in (f"org_{number}", f"bare_{number}"):
            with acting_as(Caller(service="gateway", account=name, roles=frozenset({"operator"}))):
                await billing.TopUp(
                    billing_service_pb2.TopUpRequest(amount_nanos_usd=10**17, request_id="first"), timeout=10
                )
    await channel.close()


async def ours(on: Stage, round_number: int, calls: int) -> dict[str, float]:
    plan = {
        "address": on.address,
        "tls_dir": str(on.tls_dir),
        "round": round_number,
        "calls": calls,
        "clients": CLIENTS,
        "organizations": ORGANIZATIONS,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.billing.hold_load", json.dumps(plan), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the load generator failed with exit code {process.returncode}")
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


async def bare(on: Stage, file: Path) -> float:
    """Transactions per second of pgbench."""
    process = await asyncio.create_subprocess_exec(
        str(programs() / "pgbench"),
        *(
            "--no-vacuum",
            "--protocol=prepared",
            f"--file={file}",
            f"--client={CLIENTS}",
            "--jobs=2",
            f"--time={PEER_S}",
        ),
        on.database_url,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    found = _TPS.search(output.decode())
    if process.returncode != 0 or found is None:
        raise RuntimeError(f"pgbench failed with exit code {process.returncode}: {output.decode()}")
    return float(found.group(1))


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "hold.sql"
        file.write_text(script(), encoding="utf-8")
        async with stage(Path(name)) as on:
            await pay_in(on)
            await ours(on, 0, CALLS // 10)
            calls: list[dict[str, float]] = []
            peer: list[float] = []
            for number in range(1, ROUNDS + 1):
                calls.append(await ours(on, number, CALLS))
                peer.append(await bare(on, file))
                print(f"round {number}: ours {calls[-1]}, pgbench {peer[-1]:.0f} tps", flush=True)
    rates = [each["calls_per_s"] for each in calls]
    p50, p99 = (median(each[key] for each in calls) for key in ("p50_ms", "p99_ms"))
    print(
        f"on {machine()}; {CLIENTS} clients, {ORGANIZATIONS} organizations; ours {spread(rates)} holds/s,"
        f" p50 {p50:.1f} ms, p99 {p99:.1f} ms; pgbench {spread(peer)} holds/s"
    )
    print(last_line("billing.holds", median(rates), median(peer), "holds/s", "pgbench"))


if __name__ == "__main__":
    asyncio.run(main())
