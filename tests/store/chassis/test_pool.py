"""The pool on a real database: named limits, JSON columns, transactions, and every query of the chassis prepares."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import asyncpg
import pytest

from chassis.bus import outbox
from chassis.db.bounded_pool import PoolExhausted, SecondConnection
from chassis.db.pool import Pool, database_is_away, open_pool, transaction
from chassis.db.queries import statements
from chassis.settings import ChassisSettings
from tests.harness.fixtures import SettingsFactory
from tests.harness.parties import as_another
from tests.store.chassis.world import World

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


async def test_every_query_prepares(world: World) -> None:
    async with world.pool.acquire() as connection:
        for name, sql in statements(Path(outbox.__file__).parent / "queries.sql").items():
            assert await connection.prepare(sql), name


async def test_claiming_uses_the_index_of_waiting_rows(world: World) -> None:
    sql = statements(Path(outbox.__file__).parent / "queries.sql")["claim_events"].rstrip().rstrip(";")
    async with transaction(world.pool) as connection:
        await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL plan_cache_mode = force_generic_plan")
        plan = "\n".join(row[0] for row in await connection.fetch("EXPLAIN " + sql, BEGIN, 100, ["usage"], 10.0))
    assert "outbox_waiting" in plan


async def test_statement_timeout_is_the_settings(make_settings: SettingsFactory) -> None:
    pool = await open_pool(make_settings(statement_timeout_s=0.2))
    with pytest.raises(asyncpg.QueryCanceledError):
        await pool.execute("SELECT pg_sleep(5)")
    await pool.close()


async def test_the_servers_kernel_gives_up_a_client_that_vanished(make_settings: SettingsFactory) -> None:
    """Whatever it held, and long before its transaction may take no longer."""
    pool = await open_pool(make_settings(keepalive_s=7.0))
    names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
    assert [await pool.fetchval(f"SHOW {name}") for name in names] == ["7", "7", "3"]
    await pool.close()


async def test_a_process_that_freezes_in_the_middle_of_its_rows_gives_its_locks_back(
    make_settings: SettingsFactory,
) -> None:
    """The server waits for more of a message then, which is neither a statement nor an idle transaction to it."""
    settings = make_settings(transaction_s_max=0.5, statement_timeout_s=5.0)
    pool = await open_pool(settings)
    await pool.execute("DROP TABLE IF EXISTS counted; CREATE TABLE counted AS SELECT 1 AS id, 0 AS amount")
    locked, thawed = threading.Event(), threading.Event()
    frozen = asyncio.create_task(asyncio.to_thread(_freeze, settings, locked, thawed))
    await asyncio.to_thread(locked.wait)
    try:
        # Whoever waits for the row gets it, before the end of the time that a statement may take.
        assert await pool.execute("UPDATE counted SET amount = 7 WHERE id = 1") == "UPDATE 1"
    finally:
        thawed.set()
        (woken,) = await asyncio.gather(frozen, return_exceptions=True)
        await pool.close()
    assert isinstance(woken, Exception)
    assert database_is_away(woken)
    assert database_is_away(asyncpg.TransactionTimeoutError())


def _freeze(settings: ChassisSettings, locked: threading.Event, thawed: threading.Event) -> None:
    """A process in small: its loop stands still after so many rows that the server has some of them."""

    def rows() -> Iterator[tuple[str]]:
        for _ in range(2000):
            yield ("x" * 1000,)
        locked.set()
        thawed.wait()

    async def work() -> None:
        pool = await open_pool(settings)
        try:
            async with transaction(pool) as connection:
                # Not by the pool's own way, which makes all rows before it sends one.
                send = partial(asyncpg.Connection.executemany, connection._con)  # type: ignore[union-attr]
                await send("UPDATE counted SET amount = length($1) WHERE id = 1", rows())
        finally:
            pool.terminate()

    asyncio.run(work())


async def test_transaction_rolls_back_and_json_is_python(world: World) -> None:
    await world.pool.execute("CREATE TABLE IF NOT EXISTS documents (content jsonb)")
    with pytest.raises(ZeroDivisionError):
        async with transaction(world.pool) as connection:
            await connection.execute("INSERT INTO documents (content) VALUES ($1)", {"lost": True})
            raise ZeroDivisionError
    async with transaction(world.pool) as connection:
        await connection.execute("INSERT INTO documents (content) VALUES ($1)", {"names": ["a", None]})
    assert [row["content"] for row in await world.pool.fetch("SELECT content FROM documents")] == [
        {"names": ["a", None]}
    ]


async def test_start_waits_a_bounded_time_for_the_database(make_settings: SettingsFactory) -> None:
    began = time.monotonic()
    with pytest.raises(OSError):
        await open_pool(make_settings(database_url="postgresql://nobody@127.0.0.1:1/none", startup_wait_s=0.3))
    assert 0.1 < time.monotonic() - began < 5


async def test_nobody_waits_for_a_connection_without_end(make_settings: SettingsFactory) -> None:
    pool = await open_pool(make_settings(pool_size_max=1, pool_wait_s_max=0.2))
    async with pool.acquire():
        # Beside the one who holds the only connection, not under it.
        refused = await as_another(_refusal(pool))
    assert refused.retry_after_s is not None
    assert "pool_wait_s_max" in refused.message
    assert database_is_away(refused)
    async with pool.acquire():
        pass
    await pool.close()


async def _refusal(pool: Pool) -> PoolExhausted:
    with pytest.raises(PoolExhausted) as refused:
        await pool.execute("SELECT 1")
    return refused.value


async def test_work_that_holds_a_connection_gets_no_second_one(world: World) -> None:
    async def ask() -> None:
        await world.pool.execute("SELECT 1")

    async with transaction(world.pool):
        with pytest.raises(SecondConnection):
            await ask()
        with pytest.raises(SecondConnection):
            await world.pool.acquire()
        # What it starts and waits for holds it up just the same.
        with pytest.raises(SecondConnection):
            await asyncio.gather(ask())
        later = asyncio.create_task(_after(ask, released := asyncio.Event()))
        await as_another(ask())
    released.set()
    await later
    connection = await world.pool.acquire()
    with pytest.raises(SecondConnection):
        await ask()
    await world.pool.release(connection)
    await ask()


async def _after(work: Callable[[], Awaitable[None]], event: asyncio.Event) -> None:
    await event.wait()
    await work()


async def test_text_that_no_column_can_hold_is_stored_with_replacements(world: World) -> None:
    bad, kept = "a\0b\ud800c\N{SNOWMAN}", "a\ufffdb\ufffdc\N{SNOWMAN}"
    async with world.pool.acquire() as connection:
        assert await connection.fetchval("SELECT $1::text", bad) == kept
        read = await connection.fetchval("SELECT $1::jsonb", {bad: [bad, 1, "\\u0000", "\U0001f600"]})
        assert read == {kept: [kept, 1, "\\u0000", "\U0001f600"]}


async def test_texts_in_arrays_are_stored_with_replacements_by_every_way_of_asking(world: World) -> None:
    bad, kept = ["a\0b", None, "\ud800", "\N{SNOWMAN}"], ["a\ufffdb", None, "\ufffd", "\N{SNOWMAN}"]
    async with world.pool.acquire() as connection, connection.transaction():
        assert await connection.fetchval("SELECT $1::text[]", bad) == kept
        assert await connection.fetchval("SELECT $1::text[]", tuple(bad)) == kept
        assert await connection.fetchval("SELECT $1::text[]", [["a\0"], ["b"]]) == [["a\ufffd"], ["b"]]
        assert [row[0] for row in await connection.fetch("SELECT unnest($1::text[])", bad)] == kept
        row = await connection.fetchrow("SELECT $1::text[], $2::integer[]", bad, [1, 2])
        assert row is not None
        assert tuple(row) == (kept, [1, 2])
        await connection.execute("CREATE TEMPORARY TABLE texts (many text[]) ON COMMIT DROP")
        await connection.execute("INSERT INTO texts VALUES ($1)", bad)
        await connection.executemany("INSERT INTO texts VALUES ($1)", [(bad,), (["plain"],)])
        rows = [row["many"] async for row in connection.cursor("SELECT many FROM texts WHERE many <> $1", ["\0"])]
        assert rows == [kept, kept, ["plain"]]
    # Without a connection of one's own, too.
    assert await world.pool.fetchval("SELECT $1::text[]", bad) == kept
