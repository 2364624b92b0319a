"""A ledger from before the chain is taken over whole: numbered, hashed, summed, and booked on."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool, transaction
from services.billing.config import MIGRATIONS, BillingSettings
from services.billing.ledger import entries
from services.billing.ledger.chain import Link, links
from services.billing.ledger.derived_ids import transaction_id
from services.billing.ledger.entries import Account, Posting, Transaction, TransactionKind
from services.billing.prices.catalogue import open_catalogue
from tests.harness.servers import PostgresServer
from tests.store.billing.world import USD, World, minute, resource

# The version had no end when it priced the ledger: the end was written into the file with the next version.
BOOK = (BillingSettings.model_fields["price_books_dir"].default / "default-2026-1.yaml").read_text(encoding="utf-8")
AS_IT_BEGAN = "".join(line for line in BOOK.splitlines(keepends=True) if not line.startswith("effective_until:"))
# On the last day of the price book that priced the ledger: whoever ran that code then can run this one.
BEFORE = datetime(2026, 11, 30, 5, tzinfo=UTC)


async def _write_as_before(pool: Pool, entry: Transaction) -> None:
    async with transaction(pool) as connection:
        await connection.execute(
            "INSERT INTO accounts (organization_id, account)"
            " SELECT $1, unnest(ARRAY['funding', 'held', 'prepaid', 'receivable', 'revenue']) ON CONFLICT DO NOTHING",
            entry.organization_id,
        )
        await connection.execute(
            "INSERT INTO transactions VALUES ($1, $2, $3, $4, $5, $6)",
            entry.id,
            entry.kind,
            entry.organization_id,
            entry.resource,
            entry.price_book_version,
            entry.transaction_time,
        )
        await connection.executemany(
            "INSERT INTO postings VALUES ($1, $2, $3, $4)",
            [(entry.id, entry.organization_id, each.account, each.amount_nanos_usd) for each in entry.postings],
        )


@pytest.mark.parametrize("organizations", [["o"], ["o", "p"]])
async def test_an_old_ledger_becomes_a_chain(
    postgres: PostgresServer, tmp_path: Path, organizations: list[str]
) -> None:
    folder = tmp_path / "billing" / "migrations"
    folder.mkdir(parents=True)
    shutil.copy(MIGRATIONS / "0001_ledger.sql", folder)
    async with postgres.scratch() as url:
        settings = BillingSettings(database_url=url)
        pool = await open_pool(settings)
        await migrate(pool, [folder])
        booked = {
            organization: [
                entries.top_up(organization_id=organization, amount_nanos_usd=USD, request_id="1", now=BEFORE),
                Transaction(
                    id=transaction_id(TransactionKind.ENDPOINT, f"{organization}-p", "ep_1:7:0"),
                    kind=TransactionKind.ENDPOINT,
                    organization_id=organization,
                    resource=f"projects/{organization}-p/endpoints/ep_1",
                    price_book_version="default-2026-1",
                    transaction_time=BEFORE + timedelta(microseconds=1),
                    postings=(
                        Posting(account=Account.RECEIVABLE, amount_nanos_usd=-1_000_000),
                        Posting(account=Account.REVENUE, amount_nanos_usd=1_000_000),
                    ),
                ),
            ]
            for organization in organizations
        }
        for organization in organizations:
            for entry in booked[organization]:
                await _write_as_before(pool, entry)
            await pool.execute(
                "INSERT INTO price_books VALUES ('default-2026-1', 'default', $1) ON CONFLICT DO NOTHING",
                AS_IT_BEGAN,
            )
            await pool.execute(
                "INSERT INTO usage_records VALUES (gen_random_uuid(), 'ep_1:7:0', 'endpoint_minutes', $1, $2, $3,"
                " 'cpu', 1, 1000000, 1000000, 'default-2026-1', 0, 0, $4)",
                organization,
                f"{organization}-p",
                f"projects/{organization}-p/endpoints/ep_1",
                BEFORE + timedelta(microseconds=1),
            )
            await pool.execute(
                "INSERT INTO holds (resource, id, organization_id, project_id, state, base_model, method,"
                " training_tokens, validation_tokens, epochs, evaluations, price_book_version, held_nanos_usd,"
                " hold_time, parameter_count)"
                " VALUES ($1, $1, $2, $3, 'held', 'm', 'sft_lora', 1, 0, 1, 0, 'default-2026-1', 0, $4, 0)",
                resource(organization),
                organization,
                f"{organization}-p",
                BEFORE,
            )
        await migrate(pool, [MIGRATIONS])
        for organization in organizations:
            rows = await pool.fetch(
                "SELECT position, hash FROM transactions WHERE organization_id = $1 ORDER BY 1", organization
            )
            chain = links(Link(), booked[organization])
            assert [Link(position=row["position"], hash=row["hash"]) for row in rows] == chain
            sums = await pool.fetchrow("SELECT * FROM usage_sums WHERE organization_id = $1", organization)
            assert sums is not None
            assert (sums["quantity"], sums["amount_nanos_usd"], sums["record_count"]) == (1, 1_000_000, 1)
            linked = await pool.fetchval(
                "SELECT transaction_id FROM usage_records WHERE organization_id = $1", organization
            )
            assert linked == booked[organization][1].id
        async with transaction(pool) as connection:
            catalogue = await open_catalogue(connection, settings.price_books_dir, current="default")
        world = World(pool=pool, catalogue=catalogue)
        # The minute that is booked already changes nothing, and the next one continues the chain.
        await world.deliver(minute("o", 0))
        await world.deliver(minute("o", 1))
        assert await pool.fetchval("SELECT max(position) FROM transactions WHERE organization_id = 'o'") == 3
        await pool.close()
