"""Whether deleting what is past keeping keeps up with a thousand events a second while a thousand are published.

A real PostgreSQL with its defaults, a synced JetStream and the real relay. Outbox and inbox hold a million rows each,
and as many come past keeping each second as are added. `--backup` holds a snapshot all the while, as pg_dump
does; `--keep` deletes nothing, to compare with.

    python -m bench.pruning [--seconds 60] [--backup] [--keep]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
import uuid
from pathlib import Path
from statistics import quantiles

import asyncpg

from bench.report import machine
from chassis.bus.connection import connect
from chassis.bus.outbox import Outbox
from chassis.bus.relay import Relay
from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool, transaction
from chassis.ids import SystemIds
from chassis.settings import ChassisSettings
from tests.harness.servers import running_nats, running_postgres

EVENTS_PER_S = 1000
KEPT_S = 1000
FILL_S_MAX = 600.0
PRUNE_S = 6.0
# Events of one transaction.
TOGETHER = 10
PAYLOAD = b"x" * 350
HEADERS = {"ce-id": "", "ce-source": "bench", "ce-type": "bench.Event", "ce-subject": "projects/p/tuningJobs/ft-1"}
FILL_OUTBOX = """
INSERT INTO outbox (id, subject, payload, headers, created_at, published_at)
SELECT gen_random_uuid(), 'bench.filled', $2, $3, at, at
FROM generate_series(1, $1::bigint * 1000) AS number, LATERAL (
    SELECT now() - make_interval(secs => $1::bigint - number / 1000.0) AS at
) AS aged
"""
FILL_INBOX = """
INSERT INTO inbox (consumer, event_id, handled_at)
SELECT 'bench', gen_random_uuid(), now() - make_interval(secs => $1::bigint - number / 1000.0)
FROM generate_series(1, $1::bigint * 1000) AS number
"""
STATE = """
SELECT
    (SELECT count(*) FROM outbox WHERE published_at IS NULL) AS waiting,
    (SELECT count(*) FROM outbox WHERE published_at < now() - make_interval(secs => $1)) AS outbox_late,
    (SELECT count(*) FROM inbox WHERE handled_at < now() - make_interval(secs => $1)) AS inbox_late,
    pg_total_relation_size('outbox') / 1048576 AS outbox_mb,
    pg_total_relation_size('inbox') / 1048576 AS inbox_mb,
    (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'outbox') AS outbox_dead
"""


async def fill(pool: Pool) -> None:
    async with pool.acquire() as connection:
        await connection.execute("SET statement_timeout = 0")
        await connection.execute(FILL_OUTBOX, KEPT_S, PAYLOAD, HEADERS, timeout=FILL_S_MAX)
        await connection.execute(FILL_INBOX, KEPT_S, timeout=FILL_S_MAX)
        await connection.execute("VACUUM ANALYZE outbox", timeout=FILL_S_MAX)
        await connection.execute("VACUUM ANALYZE inbox", timeout=FILL_S_MAX)


class Writers:
    """Add events and handled ids at the rate, each ten in a transaction, and note how long that takes."""

    def __init__(self, pool: Pool, outbox: Outbox) -> None:
        self._pool = pool
        self._outbox = outbox
        self.seconds: list[float] = []
        self.written = 0

    async def run(self, seconds: float) -> None:
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            if self.written >= passed * EVENTS_PER_S:
                await asyncio.sleep(0.005)
                continue
            start = time.perf_counter()
            async with transaction(self._pool) as connection:
                ids = [uuid.uuid4() for _ in range(TOGETHER)]
                await connection.executemany(
                    "INSERT INTO outbox (id, subject, payload, headers) VALUES ($1, 'bench.written', $2, $3)",
                    [(id, PAYLOAD, HEADERS) for id in ids],
                )
                await connection.executemany(
                    "INSERT INTO inbox (consumer, event_id) VALUES ('bench', $1)", [(id,) for id in ids]
                )
            self._outbox.wake()
            self.seconds.append(time.perf_counter() - start)
            self.written += TOGETHER


async def measure(seconds: float, *, backup: bool, keep: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("postgres", "nats"):
            (folder / part).mkdir()
        async with (
            running_postgres(folder / "postgres") as postgres,
            running_nats(folder / "nats") as nats,
            postgres.scratch() as url,
        ):
            settings = ChassisSettings(
                service_name="bench",
                database_url=url,
                nats_url=nats.url,
                outbox_retention_s=KEPT_S,
                inbox_retention_s=KEPT_S,
                prune_interval_s=PRUNE_S if not keep else 10 * seconds,
            )
            pool, clock = await open_pool(settings), SystemClock()
            await migrate(pool, [])
            await fill(pool)
            bus, outbox = await connect(settings), Outbox(settings, clock=clock, ids=SystemIds())
            snapshot = await asyncpg.connect(url)
            if backup:
                await snapshot.execute("SET idle_in_transaction_session_timeout = 0")
                await snapshot.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                await snapshot.fetchval("SELECT count(*) FROM schema_migrations")
            relay = asyncio.create_task(Relay(pool, bus, outbox, clock=clock).run())
            writers = Writers(pool, outbox)
            writing = asyncio.create_task(writers.run(seconds))
            while not writing.done():
                await asyncio.wait({writing}, timeout=10)
                state = await pool.fetchrow(STATE, KEPT_S + 2 * PRUNE_S)
                assert state is not None
                print("  " + ", ".join(f"{key} {value}" for key, value in state.items()), flush=True)
            cuts = quantiles(writers.seconds, n=100)
            rate = writers.written / seconds
            print(
                f"{rate:.0f} events/s; a transaction of {TOGETHER}: p50 {cuts[49] * 1000:.1f} ms, p99 "
                f"{cuts[98] * 1000:.1f} ms"
            )
            await snapshot.close()
            await bus.close()
            await relay
            await pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--backup", action="store_true", help="hold a snapshot all the while")
    parser.add_argument("--keep", action="store_true", help="delete nothing")
    options = parser.parse_args()
    print(machine())
    asyncio.run(measure(options.seconds, backup=options.backup, keep=options.keep))


if __name__ == "__main__":
    main()
