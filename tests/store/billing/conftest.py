"""A fresh migrated database per test: the ledger refuses to be emptied."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest_asyncio

from chassis.db.migrations import migrate
from chassis.db.pool import open_pool, transaction
from services.billing.config import MIGRATIONS, BillingSettings
from services.billing.prices.catalogue import open_catalogue
from tests.harness.books import write_books
from tests.harness.servers import PostgresServer
from tests.store.billing.world import World


@asynccontextmanager
async def fresh_world(postgres: PostgresServer) -> AsyncIterator[World]:
    async with postgres.scratch() as url:
        settings = BillingSettings(database_url=url)
        pool = await open_pool(settings)
        await migrate(pool, [MIGRATIONS])
        with TemporaryDirectory() as folder:
            async with transaction(pool) as connection:
                catalogue = await open_catalogue(connection, write_books(Path(folder) / "books"), current="default")
        yield World(pool=pool, catalogue=catalogue)
        await pool.close()


@pytest_asyncio.fixture(loop_scope="session")
async def world(postgres: PostgresServer) -> AsyncIterator[World]:
    async with fresh_world(postgres) as fresh:
        yield fresh
