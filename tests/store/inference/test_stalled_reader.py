"""A caller who opens an answer and reads no more of it holds no engine, and pays for what the engine computed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from chassis.bus.outbox import Outbox
from chassis.clock import SystemClock
from chassis.db.pool import Pool
from chassis.errors import DeadlineExceeded
from chassis.identity import Caller
from chassis.ids import SystemIds
from finemesh.events.v1 import usage_events_pb2
from services.inference.config import InferenceSettings
from services.inference.engines.base import Engine, EngineSettings, Sampling
from services.inference.engines.stub import StubEngine
from services.inference.metering.meter import Meter
from services.inference.models.domain import Weights
from services.inference.serving.calls import Call, Prompt, Serving
from services.inference.serving.engine_pool import EnginePool
from services.inference.serving.target import Targets, base_target
from tests.harness.fixtures import SettingsFactory
from tests.harness.polling import eventually

# The stub's answer to it has more tokens than the test waits for.
PROMPT = "tell a long story"
TOKEN_S = 0.05


async def test_a_stalled_reader_is_cut_off_and_metered(
    pool: Pool, make_settings: SettingsFactory, tmp_path: Path
) -> None:
    await pool.execute("TRUNCATE outbox")
    shared = make_settings("inference")
    settings = InferenceSettings(database_url=shared.database_url, engine="stub", stalled_reader_s_max=2 * TOKEN_S)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    started: list[StubEngine] = []

    async def open_engine(path: Path, engine_settings: EngineSettings) -> Engine:
        started.append(StubEngine(path, engine_settings, token_s=TOKEN_S))
        return started[0]

    class Cache:
        @asynccontextmanager
        async def use(self, weights: Weights) -> AsyncIterator[Path]:
            yield tmp_path

    class NothingToPay:
        def reserve(self, *of_whom: object) -> contextlib.nullcontext[None]:
            return contextlib.nullcontext()

    clock = SystemClock()
    reservations: Any = NothingToPay()
    cache: Any = Cache()
    engines = EnginePool(open_engine=open_engine, engines_max=1, clock=clock)
    outbox = Outbox(settings, clock=clock, ids=SystemIds())
    meter = Meter(pool, outbox, settings=settings, clock=clock)
    serving = Serving(Targets(pool), engines, cache, meter, reservations, settings=settings, clock=clock)
    committing = asyncio.create_task(meter.run())

    answer = serving.generate(
        Call(
            generation_id="gen-1",
            caller=Caller(service="gateway", tenant="p", account="o", subject="k"),
            model="base",
            target=base_target("base", Weights(revision="rv", key="base/", files=())),
            prompt=Prompt(render=lambda engine: engine.render_text(PROMPT), chars=len(PROMPT)),
            output_tokens_max=100,
            sampling=lambda limit: Sampling(temperature=0, completion_tokens_max=limit),
            whole=False,
        )
    )
    first = await anext(answer)

    async def told() -> list[usage_events_pb2.InferenceUsage]:
        rows = await pool.fetch("SELECT payload FROM outbox")
        events = [usage_events_pb2.InferenceUsageRecorded.FromString(row["payload"]) for row in rows]
        return [record for event in events for record in event.records]

    # Nobody reads, and still the engine becomes free and the use is told.
    (record,) = await eventually(told)
    assert started[0].requests_unfinished == 0
    heard = [first]
    with pytest.raises(DeadlineExceeded) as cut_off:
        async for chunk in answer:
            # What was heard must outlive the error.
            heard.append(chunk)  # noqa: PERF401
    assert cut_off.value.reason == "READER_STALLED"
    assert heard[-1].finish_reason is None
    assert record.input_tokens == len(await started[0].render_text(PROMPT))
    # The last token was computed and metered when the reader was found to be stalled.
    assert record.output_tokens == heard[-1].usage.completion_tokens + 1
    assert await started[0].count_tokens("".join(chunk.text for chunk in heard)) == record.output_tokens - 1
    committing.cancel()
    await asyncio.wait([committing])
    await engines.close()
