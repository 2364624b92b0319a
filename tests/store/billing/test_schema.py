"""The schema is what docs/ledger.md says, every query fits it, and the database itself guards the ledger."""

import re
from pathlib import Path

import asyncpg
import pytest

from chassis.db.pool import transaction
from chassis.db.queries import statements
from services.billing import store
from services.billing.pricebook import BookConflict
from services.billing.shelf import open_shelf
from tests.store.billing.world import USD, World, ended, minute

ROOT = Path(__file__).parents[3]
DOCUMENTED = re.compile(r"^(\w+)\((.+)\)$", re.MULTILINE)

IMMUTABLE = {
    "transactions": "resource = 'x'",
    "postings": "amount_nanos_usd = 1",
    "usage_records": "quantity = 1",
    "job_endings": "ending = 'x'",
    "price_books": "source = 'x'",
}


async def test_migrations_produce_the_documented_schema(world: World) -> None:
    rows = await world.pool.fetch(
        """
        SELECT c.relname AS table_name, string_agg(
            a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN '' ELSE '?' END,
            ', ' ORDER BY a.attnum
        ) AS columns
        FROM pg_class AS c
        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'
        GROUP BY c.relname
        """
    )
    ours = {row["table_name"]: row["columns"] for row in rows}
    for chassis_table in ("outbox", "inbox", "handler_failures", "dead_letters", "schema_migrations"):
        del ours[chassis_table]
    documented = dict(DOCUMENTED.findall((ROOT / "docs/ledger.md").read_text(encoding="utf-8")))
    documented = {
        name: columns.replace("timestamptz", "timestamp with time zone") for name, columns in documented.items()
    }
    assert ours == documented


async def test_every_query_fits_the_schema(world: World) -> None:
    queries = statements(ROOT / "services/billing/queries.sql")
    assert len(queries) > 20
    async with world.pool.acquire() as connection:
        for name, sql in queries.items():
            assert await connection.prepare(sql), name


async def test_entries_are_immutable(world: World) -> None:
    await world.top_up("o", USD)
    await world.deliver(minute("o", 0), ended("o", "REFUSED", 0))
    before = await world.dump()
    for table, change in IMMUTABLE.items():
        for statement in (f"UPDATE {table} SET {change}", f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE"):  # noqa: S608
            with pytest.raises(asyncpg.PostgresError, match="immutable"):
                await world.pool.execute(statement)
    assert await world.dump() == before


async def test_accounts_cannot_vanish(world: World) -> None:
    await world.top_up("o", USD)
    with pytest.raises(asyncpg.PostgresError, match="immutable"):
        await world.pool.execute("DELETE FROM accounts")


@pytest.mark.parametrize("amounts", [[5], [5, -4], []])
async def test_postings_that_do_not_sum_to_zero_cannot_be_committed(world: World, amounts: list[int]) -> None:
    await world.top_up("o", USD)
    before = await world.dump()
    with pytest.raises(asyncpg.CheckViolationError, match="sum to"):
        async with transaction(world.pool) as connection:
            await connection.execute(
                "INSERT INTO transactions VALUES ('00000000-0000-0000-0000-000000000001', 'top_up', 'o', 'r', '', now())"
            )
            for account, amount in zip(("prepaid", "funding"), amounts, strict=False):
                await connection.execute(
                    "INSERT INTO postings VALUES ('00000000-0000-0000-0000-000000000001', 'o', $1, $2)", account, amount
                )
    assert await world.dump() == before


async def test_the_database_itself_refuses_a_negative_balance(world: World) -> None:
    await world.top_up("o", 5)
    with pytest.raises(asyncpg.CheckViolationError, match="balance_on_its_side"):
        async with transaction(world.pool) as connection:
            await connection.execute(
                "INSERT INTO transactions VALUES ('00000000-0000-0000-0000-000000000001', 'hold', 'o', 'r', '', now())"
            )
            await connection.execute(
                "INSERT INTO postings VALUES ('00000000-0000-0000-0000-000000000001', 'o', 'prepaid', -6),"
                " ('00000000-0000-0000-0000-000000000001', 'o', 'held', 6)"
            )


async def test_a_price_book_that_was_in_force_cannot_change(world: World, tmp_path: Path) -> None:
    text = (ROOT / "services/billing/books/default.yaml").read_text(encoding="utf-8")
    file = tmp_path / "default.yaml"

    async def open_again() -> list[str]:
        async with transaction(world.pool) as connection:
            return (await open_shelf(connection, tmp_path, current="default")).versions()

    file.write_text(text.replace("minimum_usd: 5.00", "minimum_usd: 4.00"))
    with pytest.raises(BookConflict, match="write a new version"):
        await open_again()
    # An end and a next version is how a price changes.
    file.write_text(text + "\neffective_until: 2027-01-01\n")
    (tmp_path / "next.yaml").write_text(
        text.replace("default-2026-1", "default-2027-1").replace("2024-01-01", "2027-01-01").replace("5.00", "4.00")
    )
    assert await open_again() == ["default-2026-1", "default-2027-1"]
    assert set(await _stored(world)) == {"default-2026-1", "default-2027-1", "together-2026"}
    # A version whose file is gone still settles what it priced.
    file.unlink()
    async with transaction(world.pool) as connection:
        shelf = await open_shelf(connection, tmp_path, current="default")
    assert shelf.version("default-2026-1").tuning_rule.minimum_nanos_usd == 5 * USD


async def _stored(world: World) -> dict[str, str]:
    async with world.pool.acquire() as connection:
        return await store.list_price_books(connection)
