"""Which adapter leaves, which is locked, and what a failed load leaves behind."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from services.inference.engines.adapters.adapter_table import Adapter, AdapterTable
from services.inference.engines.base import AdapterInvalid, AdapterNotLoaded, EngineBusy

PATH = Path("adapters")


class Memory:
    """Records what the table asks of its engine."""

    def __init__(self, *, resident_max: int = 2, known_max: int = 8) -> None:
        self.calls: list[str] = []
        self.broken: set[str] = set()
        self.pause = asyncio.Event()
        self.pause.set()
        self.table = AdapterTable(resident_max=resident_max, known_max=known_max, load=self._load, unload=self._unload)

    async def _load(self, adapter: Adapter) -> None:
        await self.pause.wait()
        if adapter.revision in self.broken:
            raise AdapterInvalid(adapter.revision, "broken")
        self.calls.append(f"+{adapter.revision}")

    async def _unload(self, adapter: Adapter) -> None:
        self.calls.append(f"-{adapter.revision}")

    async def add(self, *revisions: str) -> None:
        for revision in revisions:
            await self.table.add(revision, PATH / revision, 8)


async def test_the_least_recently_used_leaves() -> None:
    memory = Memory()
    await memory.add("a", "b", "a", "c")
    assert memory.calls == ["+a", "+b", "-b", "+c"]
    assert memory.table.resident() == ("a", "c")


async def test_an_evicted_adapter_comes_back_when_asked_for() -> None:
    memory = Memory()
    await memory.add("a", "b", "c")
    async with memory.table.lock("a") as adapter:
        assert adapter.path == PATH / "a"
    assert memory.calls == ["+a", "+b", "-a", "+c", "-b", "+a"]


async def test_a_locked_adapter_stays() -> None:
    memory = Memory()
    await memory.add("a", "b")
    async with memory.table.lock("a"):
        await memory.add("c")
        assert memory.table.resident() == ("a", "c")
        async with memory.table.lock("c"):
            with pytest.raises(EngineBusy):
                await memory.add("d")
    await memory.add("d")


async def test_many_locks_on_one_adapter_end_one_by_one() -> None:
    memory = Memory(resident_max=1)
    await memory.add("a")
    async with AsyncExitStack() as outer:
        await outer.enter_async_context(memory.table.lock("a"))
        async with memory.table.lock("a"):
            pass
        with pytest.raises(EngineBusy):
            await memory.add("b")
    await memory.add("b")


async def test_loads_at_the_same_time_are_one_load() -> None:
    memory = Memory()
    memory.pause.clear()
    tasks = [asyncio.create_task(memory.add("a")) for _ in range(5)]
    # One turn of the loop, in which all of them begin.
    await asyncio.sleep(0)
    memory.pause.set()
    await asyncio.gather(*tasks)
    assert memory.calls == ["+a"]


async def test_a_failed_load_leaves_no_trace() -> None:
    memory = Memory()
    memory.broken.add("a")
    with pytest.raises(AdapterInvalid):
        await memory.add("a")
    with pytest.raises(AdapterNotLoaded):
        async with memory.table.lock("a"):
            pass
    memory.broken.clear()
    await memory.add("a")
    assert memory.table.resident() == ("a",)


async def test_removing_an_adapter_in_use_waits_for_its_place() -> None:
    memory = Memory()
    await memory.add("a", "b")
    async with memory.table.lock("b"):
        assert await memory.table.remove("b")
        assert memory.table.resident() == ("b", "a")
        with pytest.raises(AdapterNotLoaded):
            async with memory.table.lock("b"):
                pass
    await memory.add("c")
    assert memory.calls[-2:] == ["-b", "+c"]
    assert not await memory.table.remove("never")


async def test_known_adapters_are_bounded() -> None:
    memory = Memory(resident_max=1, known_max=2)
    await memory.add("a", "b", "c")
    with pytest.raises(AdapterNotLoaded):
        async with memory.table.lock("a"):
            pass
    async with memory.table.lock("b"):
        pass


async def test_a_number_belongs_to_a_revision() -> None:
    numbers = []
    for _ in range(2):
        memory = Memory()
        await memory.add("rv_1")
        async with memory.table.lock("rv_1") as adapter:
            numbers.append(adapter.number)
    assert numbers[0] == numbers[1] > 0
