"""A migrated database, and the reconciler of endpoints on it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool
from services.inference.config import MIGRATIONS, InferenceSettings
from tests.harness.fixtures import SettingsFactory
from tests.store.inference.endpoint_world import EndpointWorld, add_base


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pool(make_settings: SettingsFactory) -> AsyncIterator[Pool]:
    pool = await open_pool(make_settings("inference"))
    await migrate(pool, [MIGRATIONS])
    yield pool
    await pool.close()


@pytest_asyncio.fixture(loop_scope="session")
async def endpoint_world(pool: Pool, make_settings: SettingsFactory) -> EndpointWorld:
    """No endpoints yet, and one base model."""
    await pool.execute("TRUNCATE endpoints, models, base_models, model_names, model_namespaces, outbox")
    await add_base(pool)
    shared = make_settings("inference")
    settings = InferenceSettings(
        database_url=shared.database_url, nats_url=shared.nats_url, tls_dir=shared.tls_dir, engine="stub"
    )
    return EndpointWorld(pool, settings)
