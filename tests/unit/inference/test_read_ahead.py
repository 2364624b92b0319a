"""An engine goes on whether or not its caller reads; a caller who takes nothing for too long is cut off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from chassis.clock import ManualClock
from chassis.errors import DeadlineExceeded
from services.inference.engines.answer_chunks import Chunk, Usage
from services.inference.engines.base import EngineFailed
from services.inference.serving.read_ahead import read_ahead

STALLED_S_MAX = 10.0


class Spoken:
    """An engine's answer, said as the test says."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.closed = asyncio.Event()
        self._said: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
        self.reader = read_ahead(self._chunks(), stalled_s_max=STALLED_S_MAX, clock=self.clock)

    async def _chunks(self) -> AsyncGenerator[Chunk, None]:
        try:
            while (said := await self._said.get()) is not None:
                if isinstance(said, Exception):
                    raise said
                yield said
        finally:
            self.closed.set()

    async def say(self, *said: str | Exception | None) -> None:
        for one in said:
            self._said.put_nowait(_chunk(one) if isinstance(one, str) else one)
        for _ in range(10 * len(said)):
            await asyncio.sleep(0)

    async def hear(self) -> str:
        return (await anext(self.reader)).text


def _chunk(text: str) -> Chunk:
    return Chunk(text=text, token_ids=(1,), usage=Usage(prompt_tokens=1, completion_tokens=1))


async def begun() -> Spoken:
    spoken = Spoken()
    await spoken.say("first")
    assert await spoken.hear() == "first"
    return spoken


async def test_the_engine_ends_although_nobody_reads() -> None:
    spoken = await begun()
    await spoken.say("second", "third", None)
    assert spoken.closed.is_set()
    assert [chunk.text async for chunk in spoken.reader] == ["second", "third"]


async def test_what_was_raised_comes_behind_what_was_said() -> None:
    spoken = await begun()
    await spoken.say("second", EngineFailed("died"))
    assert await spoken.hear() == "second"
    with pytest.raises(EngineFailed, match="died"):
        await spoken.hear()


async def test_a_reader_who_leaves_closes_the_engines_side_first() -> None:
    spoken = await begun()
    await spoken.reader.aclose()
    assert spoken.closed.is_set()


async def test_a_reader_who_takes_nothing_for_too_long_is_cut_off() -> None:
    spoken = await begun()
    await spoken.say("second")
    await spoken.clock.advance(STALLED_S_MAX)
    await spoken.say("third")
    assert not spoken.closed.is_set()
    await spoken.clock.advance(1)
    await spoken.say("fourth")
    assert spoken.closed.is_set()
    assert [await spoken.hear() for _ in range(2)] == ["second", "third"]
    with pytest.raises(DeadlineExceeded) as cut_off:
        await spoken.hear()
    assert cut_off.value.reason == "READER_STALLED"


async def test_a_slow_reader_is_not_a_stalled_one() -> None:
    spoken = await begun()
    await spoken.say("a", "b", "c", "d")
    for text in ("a", "b", "c"):
        await spoken.clock.advance(STALLED_S_MAX * 0.9)
        assert await spoken.hear() == text
        await spoken.say("more")
    assert not spoken.closed.is_set()
    await spoken.reader.aclose()


async def test_an_engine_that_says_nothing_for_long_cuts_nobody_off() -> None:
    spoken = await begun()
    await spoken.clock.advance(STALLED_S_MAX * 5)
    await spoken.say("second", None)
    assert [chunk.text async for chunk in spoken.reader] == ["second"]
