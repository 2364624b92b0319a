"""Verification on the real database: a world with everything in it agrees, and each single corruption is named.

Corruptions are made by a superuser past every trigger: what verification finds is what the database could not prevent.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import asyncpg
import pytest
import pytest_asyncio

from chassis.db.pool import Connection, Pool
from finemesh.billing.v1 import invoice_pb2
from services.billing.audit.difference import Difference
from services.billing.audit.store import AuditStore
from services.billing.audit.verification import Progress, Verification
from tests.harness.servers import PostgresServer
from tests.store.billing.conftest import fresh_world
from tests.store.billing.corruptions import ENTRY, EVERYTHING, Corruption
from tests.store.billing.full_world import fill


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def filled(postgres: PostgresServer) -> AsyncIterator[str]:
    """Name of a database that tests copy: a world is slow to make and quick to copy."""
    async with fresh_world(postgres) as world:
        await fill(world)
        name = await world.pool.fetchval("SELECT current_database()")
        # A template must not be in use.
        await world.pool.close()
        await postgres._on("postgres", f"CREATE DATABASE {name}_undone TEMPLATE {name}")
        yield name
        await postgres._on("postgres", f"DROP DATABASE {name}_undone WITH (FORCE)")


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A superuser's view of the filled database, past its triggers."""

    pool: Pool

    async def verify(self, organization_id: str | None = None, batch_rows: int = 3) -> Progress:
        verification = Verification(
            self.pool, organization_id, batch_rows=batch_rows, timeout_s=60, names_scan_max=50_000
        )
        async for _ in verification.run():
            pass
        return verification.progress

    async def difference(self, organization_id: str | None = None) -> Difference:
        found = (await self.verify(organization_id)).difference
        assert found is not None
        return found


class Single:
    """A pool of one connection, whose transaction the test takes back: a copy per corruption would be slow."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        yield self._connection

    async def execute(self, statement: str, *values: object) -> None:
        await self._connection.execute(statement, *values)

    async def fetchval(self, statement: str) -> Any:
        return await self._connection.fetchval(statement)


@asynccontextmanager
async def opened(postgres: PostgresServer, database: str, schema: str) -> AsyncIterator[Copy]:
    pool = await asyncpg.create_pool(
        postgres.cluster.url(database=database),
        min_size=0,
        max_size=2,
        server_settings={"search_path": schema, "session_replication_role": "replica", "timezone": "UTC"},
    )
    try:
        yield Copy(pool=pool)
    finally:
        await pool.close()


@pytest_asyncio.fixture(loop_scope="session")
async def copy(postgres: PostgresServer, filled: str) -> AsyncIterator[Copy]:
    """Two connections and real commits."""
    name = f"{filled}_copy"
    await postgres._on("postgres", f"CREATE DATABASE {name} TEMPLATE {filled}")
    async with opened(postgres, name, filled) as made:
        yield made
    await postgres._on("postgres", f"DROP DATABASE {name} WITH (FORCE)")


@pytest_asyncio.fixture(loop_scope="session")
async def undone(postgres: PostgresServer, filled: str) -> AsyncIterator[Copy]:
    """One connection, and nothing is left of what is done on it."""
    async with opened(postgres, f"{filled}_undone", filled) as made, made.pool.acquire() as connection:
        taken_back = connection.transaction(isolation="repeatable_read")
        await taken_back.start()
        yield Copy(pool=cast(Pool, Single(connection)))
        await taken_back.rollback()


@pytest.mark.parametrize("batch_rows", [1, 7, 1000])
async def test_a_world_of_everything_agrees(copy: Copy, batch_rows: int) -> None:
    everything = await copy.verify(batch_rows=batch_rows)
    assert everything.difference is None, everything.difference
    transactions = await copy.pool.fetchval("SELECT count(*) FROM transactions")
    records = await copy.pool.fetchval("SELECT count(*) FROM usage_records")
    holds = await copy.pool.fetchval("SELECT count(*) FROM holds")
    assert (everything.transactions, everything.usage_records, everything.holds) == (transactions, records, holds)
    assert (holds, everything.invoices) == (12, 1)
    own = [await copy.verify(organization_id, batch_rows=batch_rows) for organization_id in ("a", "b")]
    assert [one.difference for one in own] == [None, None]
    assert [one.invoices for one in own] == [1, 0]
    assert sum(one.transactions for one in own) == transactions
    assert sum(one.usage_records for one in own) == records
    assert sum(one.holds for one in own) == holds
    nobody = await copy.verify("nobody")
    assert (nobody.difference, nobody.transactions) == (None, 0)


@pytest.mark.parametrize("corruption", EVERYTHING, ids=str)
async def test_each_corruption_is_named(undone: Copy, corruption: Corruption) -> None:
    await undone.pool.execute(corruption.sql)
    found = await undone.difference()
    assert found.check == corruption.check, found
    assert found.location.startswith(corruption.location), found
    assert corruption.expected in found.expected, found
    assert corruption.found in found.found, found
    assert found.expected != found.found


async def test_a_row_that_cannot_be_read_is_a_difference(copy: Copy) -> None:
    await copy.pool.execute(f"UPDATE transactions SET transaction_time = '200000-01-01' WHERE {ENTRY}")  # noqa: S608
    found = await copy.difference()
    assert (found.check, found.expected) == ("hash chain", "rows that can be read")


async def test_another_organization_s_damage_is_not_one_s_own(copy: Copy) -> None:
    await copy.pool.execute("UPDATE accounts SET balance_nanos_usd = 0 WHERE organization_id = 'b'")
    assert (await copy.verify("a")).difference is None
    assert (await copy.difference("b")).location.startswith("organizations/b")


async def test_a_verification_sees_one_moment(copy: Copy) -> None:
    """What is booked or broken while it runs is not its matter: it reads one snapshot."""
    verification = Verification(copy.pool, None, batch_rows=1, timeout_s=60, names_scan_max=50_000)
    running = verification.run()
    await anext(running)
    await copy.pool.execute("UPDATE accounts SET balance_nanos_usd = 0; DELETE FROM usage_sums; DELETE FROM chains")
    async for _ in running:
        pass
    assert verification.progress.difference is None
    assert (await copy.difference()).check == "hash chain"


async def test_a_verification_changes_nothing_and_leaves_no_setting(copy: Copy) -> None:
    before = await copy.pool.fetchval("SELECT current_setting('statement_timeout')")
    await copy.verify()
    assert await copy.pool.fetchval("SELECT current_setting('statement_timeout')") == before


async def test_a_verification_may_last_longer_than_other_transactions(copy: Copy) -> None:
    async with copy.pool.acquire() as connection, connection.transaction():
        await AuditStore(connection, None, batch_rows=1, timeout_s=1800).begin()
        assert await connection.fetchval("SHOW transaction_timeout") == "0"
        assert await connection.fetchval("SHOW statement_timeout") == "30min"


def _line(invoice: invoice_pb2.Invoice) -> invoice_pb2.InvoiceLine:
    """The line of the completed job."""
    return invoice.lines[0]


def _drop_line(invoice: invoice_pb2.Invoice) -> None:
    del invoice.lines[-1]


def _cheaper(invoice: invoice_pb2.Invoice) -> None:
    _line(invoice).amount_nanos_usd -= 10_000_000
    invoice.total_nanos_usd -= 10_000_000


def _forged_total(invoice: invoice_pb2.Invoice) -> None:
    invoice.total_nanos_usd += 10_000_000


def _forged_price(invoice: invoice_pb2.Invoice) -> None:
    _line(invoice).unit_price_nanos_usd += 1


def _forged_link(invoice: invoice_pb2.Invoice) -> None:
    _line(invoice).usage_records[0] = "projects/a-p/usageRecords/00000000-0000-0000-0000-000000000001"


def _foreign_link(invoice: invoice_pb2.Invoice) -> None:
    _line(invoice).usage_records[0] = invoice.lines[-1].usage_records[0]


def _forged_rounding(invoice: invoice_pb2.Invoice) -> None:
    invoice.rounding_nanos_usd += 1


def _invented_note(invoice: invoice_pb2.Invoice) -> None:
    invoice.credit_notes.add(number="CN-000009", amount_nanos_usd=1)


def _reopened(invoice: invoice_pb2.Invoice) -> None:
    invoice.open = True


def _forged_money(invoice: invoice_pb2.Invoice) -> None:
    invoice.total.units += 1


@pytest.mark.parametrize(
    ("forge", "place", "expected"),
    [
        (_drop_line, "", "lines "),
        (_cheaper, " line projects/a-p/tuningJobs/ft-1", "amount_nanos_usd "),
        (_forged_price, " line projects/a-p/tuningJobs/ft-1", "unit_price_nanos_usd "),
        (_forged_link, " line projects/a-p/tuningJobs/ft-1", "usage records of the line"),
        (_foreign_link, " line projects/a-p/tuningJobs/ft-1", "usage records of the line"),
        (_invented_note, "", "credit notes 0"),
        (_forged_total, "", "total "),
        (_forged_rounding, "", ""),
        (_reopened, "", "open False"),
        (_forged_money, "", ""),
    ],
)
async def test_an_invoice_forged_with_its_digest_is_rebuilt_and_named(
    undone: Copy, forge: Callable[[invoice_pb2.Invoice], None], place: str, expected: str
) -> None:
    content = await undone.pool.fetchval("SELECT content FROM invoices")
    invoice = invoice_pb2.Invoice.FromString(content)
    forge(invoice)
    forged = invoice.SerializeToString(deterministic=True)
    assert forged != content
    await undone.pool.execute("UPDATE invoices SET content = $1, sha256 = sha256($1)", forged)
    found = await undone.difference()
    assert found.check == "invoices"
    assert found.location == f"organizations/a/invoices/2026-11 (FM-000001){place}"
    assert found.expected.startswith(expected)
    assert found.expected != found.found


async def test_names_and_addresses_are_those_of_the_day_it_was_closed(undone: Copy) -> None:
    await undone.pool.execute(
        "INSERT INTO billing_profiles VALUES ('a', 'Renamed Ltd', '{}', '', '', now())"
        " ON CONFLICT (organization_id) DO UPDATE SET legal_name = 'Renamed Ltd'"
    )
    assert (await undone.verify()).difference is None


async def test_lines_are_worded_as_they_were_when_it_was_closed(undone: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.billing.invoices.invoice._description", lambda charge: f"Work on {charge.model}")
    assert (await undone.verify()).difference is None


async def test_links_beyond_a_bounded_look_are_looked_for_one_by_one(undone: Copy) -> None:
    """As if so much had come since that the look of the close would not find the first records any more."""
    verification = Verification(undone.pool, "a", batch_rows=3, timeout_s=60, names_scan_max=1)
    async for _ in verification.run():
        pass
    assert verification.progress.difference is None
