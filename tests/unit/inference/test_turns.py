"""The prompts of one project do not keep another project's waiting for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from chassis.clock import SystemClock
from chassis.errors import InvalidArgument
from chassis.identity import Caller
from services.inference.config import InferenceSettings
from services.inference.engines.base import Engine, EngineSettings, RequestInvalid, Sampling
from services.inference.engines.stub import StubEngine
from services.inference.metering.meter import Meter
from services.inference.models.domain import Weights
from services.inference.serving.calls import Call, Prompt, Serving
from services.inference.serving.engine_pool import EnginePool
from services.inference.serving.target import Targets, base_target
from services.inference.serving.turns import Turns

NOTHING: Any = None


async def test_an_owner_has_one_turn_at_a_time_and_leaves_nothing() -> None:
    turns, active, seen = Turns(), {"a": 0, "b": 0}, []

    async def work(owner: str) -> None:
        async with turns.take(owner):
            active[owner] += 1
            seen.append(dict(active))
            await asyncio.sleep(0)
            active[owner] -= 1

    tasks = [asyncio.create_task(work(owner)) for owner in "aaabb"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(seen) == 4
    assert max(each["a"] for each in seen) == max(each["b"] for each in seen) == 1
    assert {"a": 1, "b": 1} in seen
    assert not turns._lines


@pytest.mark.parametrize(("chars", "others"), [(100, 5), (5, 100)], ids=["long", "short"])
async def test_prompts_of_projects_take_turns(tmp_path: Path, chars: int, others: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    settings = InferenceSettings(engine="stub", prompt_chars_short_max=10)
    rendered: list[str] = []
    tokenizer = asyncio.Lock()

    class Around:
        """The cache of weights and the reservations, as far as this goes."""

        @contextlib.asynccontextmanager
        async def use(self, weights: Weights) -> AsyncIterator[Path]:
            yield tmp_path

        def reserve(self, *of_whom: object) -> contextlib.nullcontext[None]:
            return contextlib.nullcontext()

    async def open_engine(path: Path, engine_settings: EngineSettings) -> Engine:
        return StubEngine(path, engine_settings)

    def call(project: str, number: int, size: int) -> Call:
        async def render(engine: Engine) -> tuple[int, ...]:
            # Prompts of this length have one tokenizer, which takes them as they come.
            async with tokenizer if size == chars else contextlib.nullcontext():
                rendered.append(f"{project}{number}")
                await asyncio.sleep(0.001)
            raise RequestInvalid("prompt", "has been seen")

        return Call(
            generation_id=f"gen-{project}-{number}",
            caller=Caller(service="gateway", tenant=project, account="o", subject="k"),
            model="base",
            target=base_target("base", Weights(revision="rv", key="base/", files=())),
            prompt=Prompt(render=render, chars=size),
            output_tokens_max=1,
            sampling=lambda limit: Sampling(completion_tokens_max=limit),
            whole=True,
        )

    clock, around = SystemClock(), Around()
    engines = EnginePool(open_engine=open_engine, engines_max=1, clock=clock)
    meter, targets = Meter(NOTHING, NOTHING, settings=settings, clock=clock), Targets(NOTHING)
    cache: Any = around
    reservations: Any = around
    serving = Serving(targets, engines, cache, meter, reservations, settings=settings, clock=clock)
    calls = [*(call("a", number, chars) for number in range(6)), call("b", 0, chars), call("a", 6, others)]
    results = await asyncio.gather(*(anext(serving.generate(each)) for each in calls), return_exceptions=True)
    assert all(isinstance(result, InvalidArgument) for result in results), results
    assert rendered.index("b0") <= 2
    assert rendered.index("a6") <= 2, "long and short ones wait for their own kind only"
    assert [each for each in rendered if each.startswith("a") and each != "a6"] == [f"a{n}" for n in range(6)]
    await engines.close()
