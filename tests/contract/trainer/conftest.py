"""The agent's world in a test: a scripted scheduler behind real mTLS, a folder as artifact store, one agent process."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from chassis.settings import ChassisSettings
from tests.contract.trainer.world import AgentWorld
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
