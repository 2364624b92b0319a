"""The agent's world in a test: a scripted scheduler behind real mTLS, a folder as artifact store, one agent process."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from chassis.settings import ChassisSettings
from tests.contract.trainer.world import ROOT, AgentWorld
from tests.harness.scripted_scheduler import SchedulerServer, ScriptedScheduler


@pytest_asyncio.fixture(loop_scope="session")
async def world(tmp_path: Path, tls_dir: Path) -> AsyncIterator[AgentWorld]:
    settings = ChassisSettings(service_name="scheduler", tls_dir=tls_dir, drain_grace_s=2)
    scheduler = ScriptedScheduler()
    server = SchedulerServer(scheduler, settings)
    await server.start()
    made = AgentWorld(scheduler=scheduler, server=server, folder=tmp_path, tls_dir=tls_dir)
    try:
        yield made
    finally:
        await made.kill_agents()
        await server.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real small base model with a real tokenizer; about twenty seconds when no earlier session made it."""
    out = tmp_path_factory.mktemp("base") / "tiny-llama"
    command = ("-m", "services.trainer.train.recipes.main", "--name", "tiny-llama", "--out", str(out))
    cache = str(ROOT / ".cache" / "base-models")
    process = await asyncio.create_subprocess_exec(sys.executable, *command, "--cache", cache, cwd=ROOT)
    assert await process.wait() == 0
    return out
