"""One running scheduler per test module, with a database and a bus of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.contract.scheduler.world import World, running_world
from tests.harness.fixtures import SettingsFactory


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(make_settings: SettingsFactory, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    port_file: Path = tmp_path_factory.mktemp("scheduler") / "port"
    async with running_world(make_settings, port_file) as world:
        yield world


@pytest.fixture
def world(running: World) -> World:
    """The running scheduler, with peers that behave."""
    script = running.script
    script.analysis_error = None
    script.hold_error = None
    script.renewal_error = None
    script.parameter_count = 1_000_000
    return running
