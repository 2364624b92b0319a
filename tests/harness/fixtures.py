"""Fixtures over the real servers: one PostgreSQL per session, one database and one nats-server per test module."""

import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from chassis import pki
from chassis.settings import ChassisSettings
from deploy.certificates import hand_over
from tests.harness.servers import NatsServer, PostgresServer, running_nats, running_postgres

SettingsFactory = Callable[..., ChassisSettings]

CERTIFIED = ("gateway", "scheduler", "trainer", "billing", "inference", "operator", "tester")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def postgres() -> AsyncIterator[PostgresServer]:
    """The session's PostgreSQL 18; a test that kills it starts it again before it ends. Its folder is not kept."""
    with tempfile.TemporaryDirectory(prefix="finemesh-postgres-", ignore_cleanup_errors=True) as folder:
        async with running_postgres(Path(folder)) as server:
            yield server


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def database_url(postgres: PostgresServer) -> AsyncIterator[str]:
    """An empty database of the module's own, with a role that owns one schema, as a service has it."""
    async with postgres.scratch() as url:
        yield url


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def nats_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NatsServer]:
    """A nats-server of the module's own, since stream and consumer names are the same everywhere."""
    async with running_nats(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def tls_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of the five services, of the launcher (`operator`) and of the test itself (`tester`)."""
    folder = tmp_path_factory.mktemp("tls")
    pki.create_authority(folder)
    for name in CERTIFIED:
        pki.issue(folder, name)
    return folder


def node_tls_dir(tls_dir: Path, node: str) -> Path:
    """The folder with the certificate of a node's agent."""
    name = f"trainer@{node}"
    pki.issue(tls_dir, name)
    hand_over(tls_dir, name, tls_dir / name)
    return tls_dir / name


@pytest.fixture(scope="module")
def make_settings(database_url: str, nats_server: NatsServer, tls_dir: Path) -> SettingsFactory:
    """`make_settings("billing", outbox_poll_s=0.01)`: settings that point at the module's servers."""

    def make(service_name: str = "tester", **overrides: Any) -> ChassisSettings:
        given = {"database_url": database_url, "nats_url": nats_server.url, "tls_dir": tls_dir, **overrides}
        return ChassisSettings(service_name=service_name, **given)

    return make
