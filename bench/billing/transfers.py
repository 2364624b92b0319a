"""Transfers on one hot account, hundreds per statement, beside one transfer per transaction by the same code.

A transfer is a ledger transaction of two postings with its link of the hash chain; every check of the database is on.
The peer books each one alone, from as many clients as make it fastest; all of them wait for the one account.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import median

from bench.report import last_line, machine, spread
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool, transaction
from services.billing.config import MIGRATIONS, BillingSettings
from services.billing.ledger import entries
from services.billing.ledger.entries import Transaction, TransactionKind
from services.billing.ledger.store import LedgerStore
from tests.harness.servers import running_postgres

ROUNDS = 5
BATCH = 500
OURS_TRANSFERS = 40_000
PEER_TRANSFERS = 600
WRITERS = 2
PEER_CLIENTS = (1, 8)
ACCOUNT = "org_hot"
POSTINGS = 2
_numbers = count(1)


def transfers(size: int) -> list[Transaction]:
    """Charges for served usage, all of one organization."""
    now = datetime.now(UTC)
    made = [
        entries.usage_charge(
            TransactionKind.INFERENCE,
            organization_id=ACCOUNT,
            project_id="proj_hot",
            resource="acme/assistant",
            work_keys=[f"gen-{next(_numbers)}"],
            amount_nanos_usd=1000,
            price_book_version="default-2026-1",
            usage_time=now,
        )
        for _ in range(size)
    ]
    return [entry for entry in made if entry is not None]


async def book(pool: Pool, batch: list[Transaction]) -> None:
    async with transaction(pool) as connection:
        standings = await LedgerStore(connection).lock([ACCOUNT])
        await LedgerStore(connection).post(standings, batch)


async def postings_per_s(pool: Pool, total: int, batch: int, clients: int) -> float:
    """Books `total` transfers in transactions of `batch` from `clients` connections at once."""
    batches = iter([transfers(batch) for _ in range(total // batch)])

    async def client() -> None:
        for each in batches:
            await book(pool, each)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return total * POSTINGS / (time.perf_counter() - began)


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        async with running_postgres(Path(name) / "postgres") as postgres, postgres.scratch() as url:
            settings = BillingSettings(database_url=url)
            pool = await open_pool(settings)
            await migrate(pool, [MIGRATIONS])
            await postings_per_s(pool, BATCH * WRITERS, BATCH, WRITERS)
            ours: list[float] = []
            alone: dict[int, list[float]] = {clients: [] for clients in PEER_CLIENTS}
            for number in range(1, ROUNDS + 1):
                ours.append(await postings_per_s(pool, OURS_TRANSFERS, BATCH, WRITERS))
                for clients, rates in alone.items():
                    rates.append(await postings_per_s(pool, PEER_TRANSFERS, 1, clients))
                rates_now = ", ".join(f"{clients} clients {rates[-1]:.0f}" for clients, rates in alone.items())
                print(f"round {number}: ours {ours[-1]:.0f} postings/s, one by one {rates_now}", flush=True)
            booked = await pool.fetchval("SELECT count(*) FROM postings")
            balance = await pool.fetchval("SELECT balance_nanos_usd FROM accounts WHERE account = 'revenue'")
            assert balance == booked // POSTINGS * 1000, "the balance is not the sum of what was booked"
            await pool.close()
    best = max(alone.values(), key=median)
    print(
        f"on {machine()}; {BATCH} transfers in a statement; ours {spread(ours)} postings/s, one by one {spread(best)}"
    )
    print(last_line("billing.transfers", median(ours), median(best), "postings/s", "one per transaction"))


if __name__ == "__main__":
    asyncio.run(main())
