"""Looks at a mesh from outside: memory, tables, streams, unread events, leases. It judges nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import asyncpg
import nats
import psutil

from deploy.local.postgres import DATABASE, Postgres
from deploy.local.stack import Stack
from deploy.local.table import POSTGRES

_TABLES = """
    SELECT n.nspname || '.' || c.relname AS name, pg_total_relation_size(c.oid) AS bytes,
           s.n_live_tup AS live, s.n_dead_tup AS dead
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_stat_all_tables AS s ON s.relid = c.oid
    WHERE c.relkind = 'r' AND n.nspname = ANY($1)
"""
SCHEMAS = ("gateway", "scheduler", "billing", "inference")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Bytes by process, table and stream, events that nobody handled yet, and seconds of CPU time by process."""

    at_s: float
    memory_bytes: dict[str, int]
    cpu_s: dict[str, float]
    table_bytes: dict[str, int]
    stream_bytes: dict[str, int]
    unread: dict[str, int]
    unpublished: int
    queued_jobs: int
    leases_lost: int
    usage_records: int


@dataclass(kw_only=True)
class Gauges:
    """Times count from the first sample."""

    stack: Stack
    began_s: float = 0.0

    async def sample(self) -> Sample:
        self.began_s = self.began_s or time.monotonic()
        tables, numbers = await self._database()
        streams, unread = await self._bus()
        processes = {name: list(tree(self.stack.pid(name))) for name in self.stack.describe()["pids"]}
        return Sample(
            at_s=time.monotonic() - self.began_s,
            memory_bytes={name: await asyncio.to_thread(memory_of, found) for name, found in processes.items()},
            cpu_s={name: cpu_of(found) for name, found in processes.items()},
            table_bytes=tables,
            stream_bytes=streams,
            unread=unread,
            **numbers,
        )

    async def validating(self) -> int:
        """Jobs that are not queued yet."""
        connection = await superuser(self.stack)
        try:
            return int(await connection.fetchval("SELECT count(*) FROM scheduler.jobs WHERE state = 'VALIDATING'"))
        finally:
            await connection.close()

    async def _database(self) -> tuple[dict[str, int], dict[str, int]]:
        connection = await superuser(self.stack)
        try:
            tables = {row["name"]: row["bytes"] for row in await connection.fetch(_TABLES, list(SCHEMAS))}
            queries = {
                "unpublished": " + ".join(
                    f"(SELECT count(*) FROM {name}.outbox WHERE published_at IS NULL)"  # noqa: S608 - names of schemas
                    for name in SCHEMAS
                ),
                "queued_jobs": "(SELECT count(*) FROM scheduler.jobs WHERE state = 'QUEUED')",
                "leases_lost": "(SELECT count(*) FROM scheduler.attempts WHERE outcome = 'LOST')",
                "usage_records": "(SELECT n_live_tup FROM pg_stat_all_tables"
                " WHERE schemaname = 'billing' AND relname = 'usage_records')",
            }
            return tables, {name: await connection.fetchval(f"SELECT {query}") for name, query in queries.items()}
        finally:
            await connection.close()

    async def _bus(self) -> tuple[dict[str, int], dict[str, int]]:
        client = await nats.connect(self.stack.bus_url)
        try:
            js, streams, unread = client.jetstream(), {}, {}
            for stream in await js.streams_info():
                name = str(stream.config.name)
                streams[name] = stream.state.bytes
                for reader in await js.consumers_info(name):
                    if reader.config.durable_name:
                        unread[f"{name} for {reader.name}"] = (reader.num_pending or 0) + (reader.num_ack_pending or 0)
            return streams, unread
        finally:
            await client.close()


async def superuser(stack: Stack) -> asyncpg.Connection:
    """A connection that sees the tables of all services."""
    port = int(stack.addresses[POSTGRES].rpartition(":")[2])
    cluster = Postgres(folder=stack.folder.postgres, port=port, password=stack.folder.secrets([POSTGRES])[POSTGRES])
    return await asyncpg.connect(cluster.url(database=DATABASE))


def tree(pid: int | None) -> Iterator[psutil.Process]:
    with suppress(psutil.Error):
        if pid is not None:
            root = psutil.Process(pid)
            yield root
            yield from root.children(recursive=True)


def memory_of(processes: list[psutil.Process]) -> int:
    """What would be free without them: pages that they share count in parts, where the system tells."""
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            full = process.memory_full_info()
            total += getattr(full, "pss", 0) or full.rss
    return total


def cpu_of(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
