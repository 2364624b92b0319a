"""Engines that serve everybody have GPUs from the scheduler's books and from nowhere else; on a CPU they have none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from chassis.clock import ManualClock
from chassis.errors import Unavailable
from services.inference.config import InferenceSettings
from services.inference.engines.base import EngineBusy, EngineSettings
from services.inference.serving.device_leases import DeviceLeases
from services.inference.serving.engine_pool import EngineKey, EnginePool
from services.inference.serving.shared_devices import SharedDevices
from tests.store.inference.endpoint_world import FakeScheduler, Line, Workshop

KEY = EngineKey(revision="rv_1")
OWNER = "nodes/only/engines/inf_1-rv_1"
IDLE_S = 20.0


class Pool:
    """Engines on GPUs, unless a test says otherwise, and a scheduler with a lease of ten seconds."""

    def __init__(self, **overrides: Any) -> None:
        self.settings = InferenceSettings(engine="stub", shared_engine_idle_s_max=IDLE_S, **overrides)
        self.clock = ManualClock()
        self.scheduler = FakeScheduler()
        self.scheduler.lease_s = 10.0
        self.line = Line(self.scheduler)
        self.workshop = Workshop()
        self.workshop.on_gpus = True
        channel: Any = self.line
        leases = DeviceLeases(channel, settings=self.settings, clock=self.clock)
        devices = SharedDevices(leases, holder="inf_1", settings=self.settings, clock=self.clock)
        self.engines = EnginePool(
            open_engine=self.workshop.open_engine, engines_max=3, clock=self.clock, devices=devices
        )

    async def use(self) -> None:
        async with self.engines.use(KEY, folder, EngineSettings()):
            pass

    async def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            await self.clock.advance(1)
            for _ in range(20):
                await asyncio.sleep(0)


@asynccontextmanager
async def folder() -> AsyncIterator[Path]:
    yield Path("rv_1")


async def test_a_shared_engine_has_its_gpu_from_the_scheduler() -> None:
    pool = Pool()
    await pool.use()
    assert list(pool.scheduler.leases) == [OWNER]
    assert pool.workshop.settings[-1].gpu_indices == (0,)
    (engine,) = pool.workshop.alive
    assert engine.until_s == pool.scheduler.lease_s - pool.settings.device_margin_s
    await pool.pass_time(5)
    assert engine.until_s == 5 + pool.scheduler.lease_s - pool.settings.device_margin_s
    await pool.engines.close()
    assert not pool.workshop.alive
    assert not pool.scheduler.leases


async def test_on_a_cpu_it_takes_no_device() -> None:
    pool = Pool()
    pool.workshop.on_gpus = False
    await pool.use()
    assert not pool.scheduler.leases
    await pool.engines.close()


async def test_it_ends_when_its_devices_are_anothers() -> None:
    pool = Pool()
    await pool.use()
    pool.scheduler.lose_all()
    pool.scheduler.leases["projects/p/endpoints/e"] = 99
    await pool.pass_time(2)
    assert not pool.workshop.alive
    assert pool.scheduler.leases == {"projects/p/endpoints/e": 99}


async def test_cut_off_it_is_told_no_later_deadline() -> None:
    pool = Pool()
    await pool.use()
    (engine,) = pool.workshop.alive
    pool.line.cut = True
    before_s = engine.until_s
    await pool.pass_time(5)
    assert engine.until_s == before_s
    pool.line.cut = False
    await pool.pass_time(1)
    assert engine.until_s > before_s
    await pool.engines.close()


async def test_one_that_nobody_uses_leaves_its_gpu_to_others() -> None:
    pool = Pool()
    await pool.use()
    await pool.pass_time(int(IDLE_S))
    assert pool.scheduler.leases
    await pool.pass_time(2)
    assert not pool.workshop.alive
    assert not pool.scheduler.leases
    await pool.use()
    assert pool.scheduler.leases
    await pool.engines.close()


async def test_without_a_free_gpu_the_call_is_told_so() -> None:
    pool = Pool(node_name="here")
    pool.scheduler.unknown_nodes.add("here")
    with pytest.raises(EngineBusy, match="no device"):
        await pool.use()
    pool.line.cut = True
    with pytest.raises(Unavailable):
        await pool.use()
    pool.line.cut = False
    assert not pool.workshop.alive
