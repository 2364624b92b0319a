"""One gateway per test, over a database of the module's own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.contract.gateway.world import World, gateway_world


@pytest_asyncio.fixture(loop_scope="session")
async def world(database_url: str, tls_dir: Path, tmp_path: Path) -> AsyncIterator[World]:
    async with gateway_world(database_url, tls_dir, tmp_path) as world:
        yield world
