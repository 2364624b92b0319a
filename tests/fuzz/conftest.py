"""The mesh under fuzz, one for all of these tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.fuzz import messages
from tests.fuzz.mesh import FuzzedMesh, running_mesh
from tests.harness.servers import PostgresServer, running_nats


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def fuzzed_mesh(
    postgres: PostgresServer, tls_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[FuzzedMesh]:
    folder = tmp_path_factory.mktemp("fuzz")
    async with (
        running_nats(tmp_path_factory.mktemp("nats")) as nats,
        running_mesh(postgres, nats, tls_dir, folder) as mesh,
    ):
        messages.NAMES.update(mesh.names)
        yield mesh
