"""Every token that an engine computed for a call is told to billing: when callers leave, the database is away or the
process is killed. Counts are compared with those of the engine's own tokenizer."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from chassis.errors import DomainError, Unavailable
from chassis.rpc.channel import open_channel
from chassis.settings import ChassisSettings
from finemesh.inference.v1 import generation_pb2 as generation
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from formats.rows import Message
from services.inference.engines.base import EngineSettings, GenerateRequest, Sampling
from services.inference.engines.stub import StubEngine
from tests.contract.inference.conftest import BASE, World, running_world
from tests.contract.inference.scripted_billing import running_billing
from tests.contract.inference.test_chat import GREEDY, HELLO, metered
from tests.harness.fixtures import SettingsFactory
from tests.harness.polling import eventually

FAILED = "SELECT query_start FROM pg_stat_activity WHERE application_name = 'inference' AND wait_event_type = 'Lock'"
# As long as the stub's answer is.
LONG = generation.SamplingParameters(temperature=0, output_tokens_max=400)
ONE_TOKEN = generation.SamplingParameters(temperature=0, output_tokens_max=1)
REQUEST = inference.ChatRequest(model=BASE, messages=HELLO, sampling=GREEDY)
STREAMED = inference.StreamChatRequest(model=BASE, messages=HELLO, sampling=LONG)
# Slow, so that a test on a busy machine finds the answer unfinished.
TOKEN_S = 0.3


async def prompt_tokens() -> int:
    """As the engine's tokenizer counts them."""
    engine = StubEngine(Path(), EngineSettings())
    return len(await engine.render_chat([Message(role=turn.role, content=turn.content) for turn in HELLO]))


async def whole_answer_tokens(base_folder: Path) -> int:
    """What the engine computes for the long answer when nobody leaves."""
    engine = StubEngine(base_folder, EngineSettings())
    await engine.start()
    prompt = await engine.render_chat([Message(role=turn.role, content=turn.content) for turn in HELLO])
    request = GenerateRequest(request_id="1", prompt_token_ids=prompt, sampling=Sampling(temperature=0))
    return [chunk.usage.completion_tokens async for chunk in engine.generate(request)][-1]


async def text_tokens(text: str) -> int:
    return await StubEngine(Path(), EngineSettings()).count_tokens(text)


@asynccontextmanager
async def locked_outbox(world: World) -> AsyncIterator[None]:
    """Nothing can be committed for billing in this block."""
    connection = await asyncpg.connect(world.settings.database_url)
    async with connection.transaction():
        await connection.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        yield
    await connection.close()


async def tries(world: World, count: int) -> None:
    """Returns once that many statements waited for the lock."""
    connection = await asyncpg.connect(world.settings.database_url)
    seen: set[object] = set()

    async def counted() -> bool:
        # The relay looks at the same table.
        seen.update(row["query_start"] for row in await connection.fetch(FAILED + " AND query LIKE 'INSERT%'"))
        return len(seen) >= count

    await eventually(counted, pause_s=0.02)
    await connection.close()


async def test_a_record_whose_commit_fails_is_kept_and_the_answer_waits_for_it(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    async with running_world(make_settings, base_folder, tmp_path, statement_timeout_s=0.2) as world:
        stub = InferenceServiceStub(world.channel)
        with world.caller():
            await stub.Chat(REQUEST)
            async with locked_outbox(world):
                waiting = asyncio.ensure_future(stub.Chat(REQUEST))
                await tries(world, 3)
                assert not waiting.done()
            answer = await waiting
        record = (await metered(world))[answer.generation_id]
        assert record.input_tokens == answer.usage.input_tokens == await prompt_tokens()
        assert (
            record.output_tokens == answer.usage.output_tokens == await text_tokens(answer.choices[0].message.content)
        )


async def test_calls_are_refused_while_too_much_waits_to_be_recorded(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    world_of = running_world(make_settings, base_folder, tmp_path, statement_timeout_s=0.2, usage_waiting_max=1)
    async with world_of as world:
        stub = InferenceServiceStub(world.channel)
        with world.caller():
            await stub.Chat(REQUEST)
            async with locked_outbox(world):
                waiting = asyncio.ensure_future(stub.Chat(REQUEST))
                await tries(world, 1)
                with pytest.raises(Unavailable) as refused:
                    await stub.Chat(REQUEST)
                assert refused.value.reason == "DEPENDENCY_UNAVAILABLE"
                assert "usage_waiting_max" in refused.value.message
            answer = await waiting
            again = await stub.Chat(REQUEST)
        assert {answer.generation_id, again.generation_id} <= (await metered(world)).keys()


async def test_an_abandoned_answer_is_metered_for_what_it_used(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    slow = {"stub_token_s": TOKEN_S, "metering_interval_s": 0.05, "sequences_max": 1}
    async with running_world(make_settings, base_folder, tmp_path, **slow) as world:
        stub = InferenceServiceStub(world.channel)
        with world.caller():
            before = await metered(world)
            call: Any = stub.Chat(inference.ChatRequest(model=BASE, messages=HELLO, sampling=LONG))
            running = asyncio.ensure_future(call)
            (left,) = await eventually(lambda: new_generations(world, before))
            running.cancel()
            # The engine has one slot: this one is answered when the other has left it, and is recorded after it.
            await stub.Chat(inference.ChatRequest(model=BASE, messages=HELLO, sampling=ONE_TOKEN))
        record = (await metered(world))[left]
        assert record.input_tokens == await prompt_tokens()
        assert 0 < record.output_tokens < await whole_answer_tokens(base_folder)


async def test_a_stop_meters_the_streams_that_it_cuts_off(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    slow = {"stub_token_s": TOKEN_S, "drain_grace_s": 1.0}
    async with running_world(make_settings, base_folder, tmp_path, **slow) as world:
        with world.caller():
            parts = aiter(InferenceServiceStub(world.channel).StreamChat(STREAMED))
            first = await anext(parts)
            world.process.stop()
            with pytest.raises(DomainError):
                async for _ in parts:
                    continue
    record = (await metered(world))[first.generation_id]
    assert record.input_tokens == await prompt_tokens()
    assert 1 <= record.output_tokens < await whole_answer_tokens(base_folder)


async def new_generations(world: World, before: dict[str, Any]) -> set[str]:
    return (await metered(world)).keys() - before.keys()


async def test_open_streams_at_a_kill_are_metered_but_for_the_last_moment(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    # Imported in this process, which ends; what is killed is a real one on the same tables and folders.
    async with running_world(make_settings, base_folder, tmp_path) as world:
        pass
    environment = {
        **os.environ,
        "FINEMESH_INFERENCE_DATABASE_URL": world.settings.database_url,
        "FINEMESH_NATS_URL": world.settings.nats_url,
        "FINEMESH_TLS_DIR": str(world.settings.tls_dir),
        "FINEMESH_ARTIFACTS_URL": world.settings.artifacts_url,
        "FINEMESH_INFERENCE_DATA_DIR": str(world.settings.data_dir),
        "FINEMESH_INFERENCE_ENGINE": "stub",
        "FINEMESH_INFERENCE_STUB_TOKEN_S": str(TOKEN_S),
        "FINEMESH_INFERENCE_METERING_INTERVAL_S": "0.05",
        "FINEMESH_INFERENCE_PORT_FILE": str(tmp_path / "killed.port"),
    }
    async with running_billing(world.billing, tmp_path, world.settings.tls_dir) as address:
        environment["FINEMESH_BILLING_ADDRESS"] = address
        await _killed_while_streaming(world, environment, tmp_path, await whole_answer_tokens(base_folder))


async def _killed_while_streaming(world: World, environment: dict[str, str], tmp_path: Path, whole_tokens: int) -> None:
    killed = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.inference.main", env=environment)
    try:
        port = await eventually(lambda: asyncio.to_thread(content, tmp_path / "killed.port"))
        gateway = ChassisSettings(
            service_name="gateway", database_url=world.settings.database_url, tls_dir=world.settings.tls_dir
        )
        channel = open_channel(gateway, f"127.0.0.1:{port}", "inference")
        heard: dict[str, str] = {}

        async def listen() -> None:
            async for part in InferenceServiceStub(channel).StreamChat(STREAMED):
                heard[part.generation_id] = heard.get(part.generation_id, "") + part.text_delta

        with world.caller():
            listening = [asyncio.ensure_future(listen()) for _ in range(3)]

        async def all_began() -> bool:
            return len(heard) == 3 and all([await text_tokens(text) >= 3 for text in heard.values()])

        await eventually(all_began)
        at_kill = {generation_id: await text_tokens(text) for generation_id, text in heard.items()}
        # One interval later everything that was heard is recorded, although no stream has ended.
        await eventually(lambda: metered(world), lambda found: records_cover(found, at_kill))
        killed.kill()
        await killed.wait()
        results = await asyncio.gather(*listening, return_exceptions=True)
        assert all(isinstance(result, DomainError) for result in results), results
        records = await metered(world)
        for generation_id, text in heard.items():
            record = records[generation_id]
            assert record.input_tokens == await prompt_tokens()
            assert at_kill[generation_id] <= record.output_tokens < whole_tokens
            # In the user's favour, but for a token that was on its way.
            assert record.output_tokens <= await text_tokens(text) + 1
    finally:
        if killed.returncode is None:
            killed.kill()
            await killed.wait()
    await channel.close()


def records_cover(found: dict[str, Any], tokens: dict[str, int]) -> bool:
    return all(id in found and found[id].output_tokens >= count for id, count in tokens.items())


def content(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
