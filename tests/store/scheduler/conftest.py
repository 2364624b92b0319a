"""A migrated database of the scheduler per module, emptied for each test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from chassis.db.pool import Pool
from services.scheduler.config import SchedulerSettings
from tests.store.scheduler.world import World, fresh_world, migrated_pool


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def scheduler_pool(database_url: str, tls_dir: Path) -> AsyncIterator[tuple[Pool, SchedulerSettings]]:
    settings = SchedulerSettings(database_url=database_url, tls_dir=tls_dir)
    pool = await migrated_pool(settings)
    yield pool, settings
    await pool.close()


@pytest_asyncio.fixture(loop_scope="session")
async def world(scheduler_pool: tuple[Pool, SchedulerSettings]) -> World:
    return await fresh_world(*scheduler_pool)
