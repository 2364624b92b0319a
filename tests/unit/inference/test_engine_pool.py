"""How engines live and die: one start for many callers, room made by the idlest, failures that leave no trace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from chassis.clock import SystemClock
from services.inference.engines.base import Engine, EngineBusy, EngineFailed, EngineSettings
from services.inference.serving.engine_pool import EngineKey, EnginePool


class FakeEngine:
    """Counts its starts and stops; dies when told."""

    on_gpus = False

    def __init__(self, shop: Workshop, broken: bool = False) -> None:
        self.shop = shop
        self.broken = broken
        self.started = 0
        self.stopped = 0
        self.ended = asyncio.Event()
        self.died: asyncio.Future[EngineFailed] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        self.started += 1
        self.shop.alive.add(self)
        self.shop.most_alive = max(self.shop.most_alive, len(self.shop.alive))
        # A start takes a while, in which others ask for the same engine.
        await asyncio.sleep(0.01)
        if self.broken:
            raise EngineFailed("cannot start")

    async def stop(self) -> None:
        # An engine takes its time to free its memory.
        await asyncio.sleep(0.005)
        self.shop.alive.discard(self)
        self.stopped += 1
        self.ended.set()

    async def wait_failed(self) -> EngineFailed:
        return await self.died


class Workshop:
    """Opens fake engines and remembers them in order."""

    def __init__(self, engines_max: int = 2) -> None:
        self.opened: list[FakeEngine] = []
        self.alive: set[FakeEngine] = set()
        self.most_alive = 0
        self.broken = False
        self.folders_in_use = 0
        self.pool = EnginePool(open_engine=self._open, engines_max=engines_max, clock=SystemClock())

    async def _open(self, path: Path, settings: EngineSettings) -> Engine:
        engine = FakeEngine(self, self.broken)
        self.opened.append(engine)
        return engine  # type: ignore[return-value]

    async def start(self, owner: str) -> None:
        @asynccontextmanager
        async def folder() -> AsyncIterator[Path]:
            yield Path(owner)

        await self.pool.start(EngineKey(owner=owner), folder, EngineSettings())

    def use(self, revision: str, owner: str = "") -> AbstractAsyncContextManager[Engine]:
        @asynccontextmanager
        async def folder() -> AsyncIterator[Path]:
            self.folders_in_use += 1
            yield Path(revision)
            self.folders_in_use -= 1

        return self.pool.use(EngineKey(revision=revision, owner=owner), folder, EngineSettings())


async def test_callers_share_one_start() -> None:
    shop = Workshop()

    async def call() -> object:
        async with shop.use("rv_1") as engine:
            return engine

    found = await asyncio.gather(*(call() for _ in range(20)))
    assert len(shop.opened) == 1
    assert shop.opened[0].started == 1
    assert all(engine is shop.opened[0] for engine in found)


async def test_an_engine_keeps_its_weights_until_it_is_stopped() -> None:
    shop = Workshop()
    async with shop.use("rv_1"):
        pass
    assert shop.folders_in_use == 1
    await shop.pool.remove(EngineKey(revision="rv_1"))
    assert shop.folders_in_use == 0
    shop.broken = True
    with pytest.raises(EngineFailed):
        async with shop.use("rv_2"):
            pass
    assert shop.folders_in_use == 0


async def test_a_caller_that_gives_up_does_not_end_the_start() -> None:
    shop = Workshop()

    async def call() -> None:
        async with shop.use("rv_1"):
            pass

    impatient, patient = asyncio.create_task(call()), asyncio.create_task(call())
    # One turn of the loop, in which both begin to wait.
    await asyncio.sleep(0)
    impatient.cancel()
    await patient
    assert shop.opened[0].started == 1
    assert shop.opened[0].stopped == 0


async def test_a_failed_start_leaves_no_slot_behind() -> None:
    shop = Workshop()
    shop.broken = True
    with pytest.raises(EngineFailed):
        async with shop.use("rv_1"):
            pass
    assert shop.opened[0].stopped == 1
    shop.broken = False
    async with shop.use("rv_1"):
        pass
    assert len(shop.opened) == 2


async def test_the_longest_unused_engine_makes_room_and_a_used_one_never_does() -> None:
    shop = Workshop(engines_max=2)
    for revision in ("rv_1", "rv_2"):
        async with shop.use(revision):
            pass
    async with shop.use("rv_3"):
        assert [engine.stopped for engine in shop.opened] == [1, 0, 0]
        async with shop.use("rv_2"):
            with pytest.raises(EngineBusy):
                async with shop.use("rv_4"):
                    pass
    # An endpoint's engine runs on devices of its own and takes nobody's room.
    await shop.start("ep_1")
    async with shop.use("", owner="ep_1"):
        assert [engine.stopped for engine in shop.opened] == [1, 0, 0, 0]


async def test_an_endpoints_engine_is_started_by_its_keeper_alone_and_not_after_its_stop() -> None:
    shop = Workshop()
    key = EngineKey(owner="ep_1:1")
    for _ in range(2):
        with pytest.raises(EngineFailed):
            async with shop.use("", owner="ep_1:1"):
                pass
        starting = asyncio.create_task(shop.start("ep_1:1"))
        await asyncio.sleep(0)
        await shop.pool.remove(key)
        with pytest.raises(EngineFailed):
            await starting
    assert not shop.alive


async def test_the_limit_of_engines_holds_for_any_number_of_callers_at_once() -> None:
    shop = Workshop(engines_max=3)

    async def call(number: int) -> None:
        try:
            async with shop.use(f"rv_{number}"):
                await asyncio.sleep(0.001)
        except EngineBusy:
            await asyncio.sleep(0.01)

    for _ in range(5):
        await asyncio.gather(*(call(number) for number in range(12)))
    assert shop.most_alive == 3
    await shop.pool.close()
    assert not shop.alive
    with pytest.raises(EngineFailed):
        await call(1)


async def test_a_dead_engine_is_replaced() -> None:
    shop = Workshop()
    async with shop.use("rv_1"):
        pass
    shop.opened[0].died.set_result(EngineFailed("killed"))
    await asyncio.wait_for(shop.opened[0].ended.wait(), 30)
    assert not shop.pool.is_running(EngineKey(revision="rv_1"))
    assert shop.opened[0].stopped == 1
    async with shop.use("rv_1"):
        assert shop.pool.is_running(EngineKey(revision="rv_1"))
    await shop.pool.close()
    assert shop.opened[1].stopped == 1
