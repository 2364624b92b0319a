"""Looks at the tables, streams, archive and memory of a year. It judges nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import psutil
from nats.js import JetStreamContext

from bench.soak.gauges import memory_of

# Larger tables are only estimated between quarters; those are kept for ever anyway.
_COUNTED_BYTES_MAX = 256 * 1024 * 1024
_TABLES = """
    SELECT c.relname AS name, pg_total_relation_size(c.oid) AS bytes, pg_stat_get_live_tuples(c.oid) AS live
    FROM pg_class AS c
    WHERE c.relkind = 'r' AND c.relnamespace = $1::regnamespace
    ORDER BY c.relname
"""


@dataclass(frozen=True, kw_only=True)
class Size:
    rows: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Tables as `service.table`; `events` and `records` were emitted so far. `settle_s` are seconds until what a day
    emitted was booked, of the days since the last sample."""

    day: int
    events: int
    records: int
    settle_s: tuple[float, ...]
    tables: Mapping[str, Size]
    streams: Mapping[str, Size]
    # Delivered to a reader and not answered, or not delivered, of each stream.
    unread: Mapping[str, int]
    archive: Size
    memory_bytes: Mapping[str, int]


async def measure_tables(schemas: Mapping[str, asyncpg.Connection], roles: Mapping[str, str]) -> dict[str, Size]:
    """Rows are counted, unless there are very many."""
    found: dict[str, Size] = {}
    for service, connection in schemas.items():
        for row in await connection.fetch(_TABLES, roles[service]):
            rows = row["live"]
            if row["bytes"] <= _COUNTED_BYTES_MAX:
                rows = await connection.fetchval(f"SELECT count(*) FROM {roles[service]}.{row['name']}")  # noqa: S608
            found[f"{service}.{row['name']}"] = Size(rows=rows, bytes=row["bytes"])
    return found


async def measure_streams(jetstream: JetStreamContext) -> tuple[dict[str, Size], dict[str, int]]:
    sizes: dict[str, Size] = {}
    unread: dict[str, int] = {}
    for stream in await jetstream.streams_info():
        name = str(stream.config.name)
        sizes[name] = Size(rows=stream.state.messages, bytes=stream.state.bytes)
        for reader in await jetstream.consumers_info(name):
            unread[f"{name} for {reader.name}"] = (reader.num_pending or 0) + (reader.num_ack_pending or 0)
    return sizes, unread


async def measure_archive(folder: Path) -> Size:
    def look() -> Size:
        files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        return Size(rows=len(files), bytes=sum(files))

    return await asyncio.to_thread(look)


async def measure_memory() -> dict[str, int]:
    """This process, in which all parts of the services live, and its servers."""

    def look() -> dict[str, int]:
        me = psutil.Process()
        groups: dict[str, list[psutil.Process]] = {"services": [me], "nats": [], "postgres": []}
        for child in me.children(recursive=True):
            # Autovacuum's workers come and go.
            with suppress(psutil.Error):
                groups[next(name for name in ("nats", "postgres") if name in child.name())].append(child)
        return {name: memory_of(processes) for name, processes in groups.items()}

    return await asyncio.to_thread(look)
