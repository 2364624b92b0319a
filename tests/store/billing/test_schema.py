"""The schema is what docs/ledger.md says, every query fits it, and the database itself guards the ledger."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from chassis.db.pool import transaction
from chassis.db.queries import statements
from services.billing.prices.catalogue import open_catalogue
from services.billing.prices.pricebook import BookConflict
from services.billing.prices.store import PriceStore
from tests.harness.books import book_text
from tests.harness.schemas import documented_tables, stored_tables
from tests.harness.servers import PostgresServer
from tests.store.billing.world import USD, World, ended, minute, train

ROOT = Path(__file__).parents[3]

IMMUTABLE = {
    "transactions": "resource = 'x'",
    "postings": "amount_nanos_usd = 1",
    "usage_records": "quantity = 1",
    "job_endings": "ending = 'x'",
    "price_books": "source = 'x'",
    "invoices": "total_nanos_usd = 1",
    "credit_notes": "amount_nanos_usd = 1",
}
# What is written in place but never taken away.
KEPT = ("holds", "accounts", "chains", "usage_sums", "document_numbers")


async def test_migrations_produce_the_documented_schema(world: World) -> None:
    assert await stored_tables(world.pool) == documented_tables(ROOT / "docs/ledger.md")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "services/billing").rglob("queries.sql")), ids=lambda file: file.parent.name
)
async def test_every_query_fits_the_schema(world: World, file: Path) -> None:
    queries = statements(file)
    assert queries
    async with world.pool.acquire() as connection:
        # Tables of a session are made by queries as well; whatever uses them is prepared after them.
        made = [sql for sql in queries.values() if "CREATE TEMP TABLE" in sql]
        for sql in made:
            await connection.execute(sql)
        for name, sql in queries.items():
            assert sql in made or await connection.prepare(sql), name


async def test_entries_are_immutable_for_their_owner_and_for_a_superuser(
    world: World, postgres: PostgresServer
) -> None:
    await world.top_up("o", USD)
    await world.deliver(minute("o", 0), ended("o", "REFUSED", 0))
    before = await world.dump()
    async with superuser(world, postgres) as root:
        for table, change in IMMUTABLE.items():
            for statement in (f"UPDATE {table} SET {change}", f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE"):  # noqa: S608
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await world.pool.execute(statement)
                with pytest.raises(asyncpg.RestrictViolationError, match="immutable"):
                    await root.execute(statement)
    assert await world.dump() == before


async def test_an_owner_that_takes_its_rights_back_meets_the_triggers(world: World) -> None:
    """The service owns its tables, so it can grant itself what was revoked; the database refuses all the same."""
    await world.top_up("o", USD)
    await world.deliver(minute("o", 0), ended("o", "REFUSED", 0))
    before = await world.dump()
    for table in (*IMMUTABLE, *KEPT):
        await world.pool.execute(f"GRANT UPDATE, DELETE, TRUNCATE ON {table} TO CURRENT_USER")
        changes = [f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE"]  # noqa: S608
        if table in IMMUTABLE:
            changes.append(f"UPDATE {table} SET {IMMUTABLE[table]}")  # noqa: S608
        for statement in changes:
            with pytest.raises(asyncpg.RestrictViolationError, match="immutable"):
                await world.pool.execute(statement)
    assert await world.dump() == before


@pytest.mark.parametrize(
    "change",
    ["held_nanos_usd = 1", "epochs = 1", "price_book_version = 'x'", "organization_id = 'x'", "hold_time = now()"],
)
async def test_a_quote_that_is_held_cannot_change(world: World, change: str) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    with pytest.raises(asyncpg.RestrictViolationError, match="quote of a hold is immutable"):
        await world.pool.execute(f"UPDATE holds SET {change}")  # noqa: S608


@pytest.mark.parametrize(
    "change", ["charged_nanos_usd = 1", "state = 'held', end_time = NULL, billing_month = NULL", "discrepancy = 'x'"]
)
async def test_a_hold_that_ended_stays_so(world: World, change: str) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.deliver(ended("o", "PLATFORM_FAILURE", 1))
    with pytest.raises(asyncpg.RestrictViolationError, match="end of a hold is immutable"):
        await world.pool.execute(f"UPDATE holds SET {change}")  # noqa: S608
    # What it did still comes and is worth nothing.
    await world.deliver(train("o", 0, 20))
    assert (await world.hold_row("o"))["adjustment_nanos_usd"] == -20 * 1000 * 6100


DERIVED = {"accounts": "balance_nanos_usd = 0", "chains": "position = 0", "usage_sums": "quantity = 0"}


@pytest.mark.parametrize(("table", "change"), DERIVED.items())
async def test_what_follows_from_entries_cannot_be_set(
    world: World, postgres: PostgresServer, table: str, change: str
) -> None:
    await world.top_up("o", USD)
    await world.deliver(minute("o", 0))
    before = await world.dump()
    for statement in (f"UPDATE {table} SET {change}", f"DELETE FROM {table}", f"TRUNCATE {table}"):  # noqa: S608
        with pytest.raises((asyncpg.RestrictViolationError, asyncpg.InsufficientPrivilegeError)):
            await world.pool.execute(statement)
        async with superuser(world, postgres) as root:
            with pytest.raises(asyncpg.RestrictViolationError):
                await root.execute(statement)
    assert await world.dump() == before


HEAD = (
    "INSERT INTO transactions"
    " (id, kind, organization_id, resource, price_book_version, transaction_time, position, hash)"
    " VALUES (gen_random_uuid(), 'top_up', 'o', 'r', '', now(), $1, sha256('x'))"
)
POSTINGS = "INSERT INTO postings (organization_id, position, account, amount_nanos_usd) VALUES "


@pytest.mark.parametrize(
    "postings",
    ["('o', 2, 'prepaid', 5)", "('o', 2, 'prepaid', 5), ('o', 2, 'funding', -4)", ""],
    ids=["one", "not zero", "none"],
)
async def test_postings_that_do_not_sum_to_zero_cannot_be_committed(world: World, postings: str) -> None:
    await world.top_up("o", USD)
    before = await world.dump()
    with pytest.raises(asyncpg.CheckViolationError, match="sum to zero"):
        async with transaction(world.pool) as connection:
            await connection.execute(HEAD, 2)
            if postings:
                await connection.execute(POSTINGS + postings)
    assert await world.dump() == before


@pytest.mark.parametrize(
    ("postings", "problem"),
    [
        ("('o', 1, 'held', 5), ('o', 1, 'revenue', -5)", "come once"),
        ("('o', 2, 'held', 5), ('o', 2, 'revenue', -5)", "transaction that waits"),
    ],
)
async def test_postings_come_with_their_transaction_and_never_later(world: World, postings: str, problem: str) -> None:
    await world.top_up("o", USD)
    with pytest.raises(asyncpg.CheckViolationError, match=problem):
        await world.pool.execute(POSTINGS + postings)


@pytest.mark.parametrize("position", [1, 3, 0])
async def test_a_transaction_continues_the_chain(world: World, position: int) -> None:
    await world.top_up("o", USD)
    with pytest.raises((asyncpg.CheckViolationError, asyncpg.UniqueViolationError)):
        await world.pool.execute(HEAD, position)


async def test_a_posting_needs_its_account(world: World) -> None:
    await world.top_up("o", USD)
    with pytest.raises(asyncpg.ForeignKeyViolationError, match="account that does not exist"):
        async with transaction(world.pool) as connection:
            await connection.execute(HEAD, 2)
            await connection.execute(POSTINGS + "('o', 2, 'prepaid', 5), ('o', 2, 'magic', -5)")


async def test_the_database_itself_refuses_a_negative_balance(world: World) -> None:
    await world.top_up("o", 5)
    with pytest.raises(asyncpg.CheckViolationError, match="balance_on_its_side"):
        async with transaction(world.pool) as connection:
            await connection.execute(HEAD, 2)
            await connection.execute(POSTINGS + "('o', 2, 'prepaid', -6), ('o', 2, 'held', 6)")


async def test_a_price_book_that_was_in_force_cannot_change(world: World, tmp_path: Path) -> None:
    text = book_text("default-2026-2")
    file = tmp_path / "default-2026-2.yaml"

    async def open_again() -> list[str]:
        async with transaction(world.pool) as connection:
            return (await open_catalogue(connection, tmp_path, current="default")).versions()

    file.write_text(text.replace("minimum: {usd: 5.00", "minimum: {usd: 4.00"))
    with pytest.raises(BookConflict, match=r"^default-2026-2\.yaml, line 6: .* write a new version"):
        await open_again()
    # An end and a next version is how a price changes.
    file.write_text(text + "\neffective_until: 2027-01-01\n")
    (tmp_path / "next.yaml").write_text(
        text.replace("default-2026-2", "default-2027-1").replace("2026-11-01", "2027-01-01").replace("5.00", "4.00")
    )
    assert await open_again() == ["default-2026-2", "default-2027-1"]
    assert set(await _stored(world)) == {"default-2026-1", "default-2026-2", "default-2027-1", "together-2026"}
    # A version whose file is gone still settles what it priced.
    file.unlink()
    async with transaction(world.pool) as connection:
        catalogue = await open_catalogue(connection, tmp_path, current="default")
    assert catalogue.version("default-2026-2").tuning_rule.minimum_nanos_usd == 5 * USD


async def test_a_price_book_does_not_end_before_the_use_that_it_priced(world: World, tmp_path: Path) -> None:
    """A replay would price that use by the next version, and write another ledger."""
    await world.deliver(minute("o", 0))
    text = book_text("default-2026-2")
    file = tmp_path / "default-2026-2.yaml"
    file.write_text(text + "\neffective_until: 2026-11-23\n")
    with pytest.raises(BookConflict, match=r"^default-2026-2\.yaml, line 7: .* priced use of 2026-11-23.* 2026-11-24"):
        async with transaction(world.pool) as connection:
            await open_catalogue(connection, tmp_path, current="default")
    file.write_text(text + "\neffective_until: 2026-11-24\n")
    async with transaction(world.pool) as connection:
        catalogue = await open_catalogue(connection, tmp_path, current="default")
    assert catalogue.version("default-2026-2").effective_until is not None


@pytest.mark.parametrize("moved", ["effective_until: 2026-12-20", "effective_until: 2026-11-25", ""])
async def test_an_end_that_is_stored_is_not_moved(world: World, tmp_path: Path, moved: str) -> None:
    """The database keeps the first one, by which `verify` judges what was used after it."""
    text = book_text("default-2026-2").replace("default-2026-2", "other-1").replace("book: default", "book: other")
    file = tmp_path / "other-1.yaml"
    file.write_text(text + "\neffective_until: 2026-12-01\n")
    for _ in range(2):
        async with transaction(world.pool) as connection:
            await open_catalogue(connection, tmp_path, current="other")
    file.write_text(text + f"\n{moved}\n")
    with pytest.raises(BookConflict, match=r"^other-1\.yaml, line \d+: .* ends on 2026-12-01.* write that end back"):
        async with transaction(world.pool) as connection:
            await open_catalogue(connection, tmp_path, current="other")


@asynccontextmanager
async def superuser(world: World, postgres: PostgresServer) -> AsyncIterator[asyncpg.Connection]:
    """The world's own schema with all rights."""
    where = await world.pool.fetchrow("SELECT current_database(), current_schema()")
    assert where is not None
    database, schema = where
    connection = await asyncpg.connect(postgres.cluster.url(database=database))
    try:
        await connection.execute(f"SET search_path = {schema}")
        yield connection
    finally:
        await connection.close()


async def _stored(world: World) -> dict[str, str]:
    async with world.pool.acquire() as connection:
        return await PriceStore(connection).list_books()
