"""What callers of InferenceService rely on: the same answer by every door, typed refusals,
and usage metered exactly."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import asyncpg
import pytest

from chassis.errors import DomainError, InvalidArgument, NotFound
from finemesh.events.v1 import usage_events_pb2
from finemesh.inference.v1 import generation_pb2 as generation
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.contract.inference.conftest import BASE, World
from tests.harness.polling import eventually

HELLO = [generation.ChatMessage(role="user", content="hello there")]
GREEDY = generation.SamplingParameters(temperature=0, output_tokens_max=12)


async def metered(world: World) -> dict[str, usage_events_pb2.InferenceUsage]:
    """What was written for billing, the parts of each generation added up."""
    connection = await asyncpg.connect(world.settings.database_url)
    rows = await connection.fetch("SELECT payload FROM outbox WHERE subject = 'usage.inference.recorded'")
    await connection.close()
    found: dict[str, usage_events_pb2.InferenceUsage] = {}
    told: set[str] = set()
    for row in rows:
        for record in usage_events_pb2.InferenceUsageRecorded.FromString(row["payload"]).records:
            # As billing does: the same work is the same use, however often it is told.
            if record.work_key in told:
                continue
            told.add(record.work_key)
            generation_id = re.sub(r":\d+-\d+$", "", record.work_key)
            if (known := found.setdefault(generation_id, record)) is not record:
                known.input_tokens += record.input_tokens
                known.output_tokens += record.output_tokens
    return found


async def test_unary_and_stream_give_the_same_answer_and_are_metered(world: World) -> None:
    stub = InferenceServiceStub(world.channel)
    with world.caller():
        whole = await stub.Chat(inference.ChatRequest(model=BASE, messages=HELLO, sampling=GREEDY))
        parts = [
            part
            async for part in stub.StreamChat(inference.StreamChatRequest(model=BASE, messages=HELLO, sampling=GREEDY))
        ]
    assert "".join(part.text_delta for part in parts) == whole.choices[0].message.content
    assert parts[-1].finish_reason == whole.choices[0].finish_reason != generation.FINISH_REASON_UNSPECIFIED
    assert parts[-1].usage == whole.usage
    assert parts[0].revision == whole.revision != ""
    records = await metered(world)
    for answer, usage in ((whole, whole.usage), (parts[0], parts[-1].usage)):
        record = records[answer.generation_id]
        assert (record.input_tokens, record.output_tokens) == (usage.input_tokens, usage.output_tokens)
        assert (record.project_id, record.organization_id) == ("proj_a", "org_of_proj_a")
        assert record.api_key_id == "key_1"
        assert record.base_model == BASE


async def test_a_stream_that_is_left_early_is_metered_for_what_it_used(world: World) -> None:
    stub = InferenceServiceStub(world.channel)
    long = generation.SamplingParameters(temperature=0, output_tokens_max=400)
    with world.caller():
        call = stub.StreamChat(inference.StreamChatRequest(model=BASE, messages=HELLO, sampling=long))
        first: Any = await call.read()
        call.cancel()
    records = await eventually(lambda: metered(world), lambda records: first.generation_id in records)
    assert 0 < records[first.generation_id].output_tokens <= 400


async def test_a_tuned_model_answers_with_its_adapters_revision(world: World, tuned_model: str) -> None:
    stub = InferenceServiceStub(world.channel)
    with world.caller():
        base = await stub.Chat(inference.ChatRequest(model=BASE, messages=HELLO, sampling=GREEDY))
        tuned = await stub.Chat(inference.ChatRequest(model=tuned_model, messages=HELLO, sampling=GREEDY))
        served = await stub.ListServedModels(inference.ListServedModelsRequest())
    assert tuned.revision == "rv_tuned" != base.revision
    assert tuned.choices[0].message.content != base.choices[0].message.content
    assert {(m.model_id, m.kind) for m in served.models} >= {(BASE, "base"), (tuned_model, "tuned")}
    record = (await metered(world))[tuned.generation_id]
    assert (record.model_id, record.base_model) == (tuned_model, BASE)


async def test_a_burst_of_calls_to_a_tuned_model_all_answers(world: World, tuned_model: str) -> None:
    """Far more calls at a time than the pool has connections."""
    stub = InferenceServiceStub(world.channel)
    assert world.settings.pool_size_max == 10
    with world.caller():
        async with asyncio.timeout(60):
            answers = await asyncio.gather(
                *(
                    stub.Chat(inference.ChatRequest(model=tuned_model, messages=HELLO, sampling=GREEDY))
                    for _ in range(64)
                )
            )
    assert {answer.revision for answer in answers} == {"rv_tuned"}
    records = await metered(world)
    assert all(answer.generation_id in records for answer in answers)


async def test_foreign_tuned_models_do_not_exist(world: World, tuned_model: str) -> None:
    with world.caller(project="proj_b", namespace="other"), pytest.raises(NotFound) as refused:
        await InferenceServiceStub(world.channel).Chat(inference.ChatRequest(model=tuned_model, messages=HELLO))
    assert refused.value.reason == "MODEL_UNKNOWN"


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (inference.ChatRequest(model=BASE), "INVALID_FIELD", "messages"),
        (
            inference.ChatRequest(model=BASE, messages=[generation.ChatMessage(role="robot", content="x")]),
            "INVALID_FIELD",
            "messages[0].role",
        ),
        (
            inference.ChatRequest(model=BASE, messages=HELLO, sampling=generation.SamplingParameters(temperature=9.0)),
            "INVALID_FIELD",
            "temperature",
        ),
        (
            inference.ChatRequest(
                model=BASE, messages=HELLO, sampling=generation.SamplingParameters(output_tokens_max=0)
            ),
            "INVALID_FIELD",
            "max_tokens",
        ),
        (
            inference.ChatRequest(
                model=BASE, messages=HELLO, sampling=generation.SamplingParameters(output_tokens_max=100_000)
            ),
            "CONTEXT_TOO_LONG",
            None,
        ),
        (
            # One token of the stub: refused for its characters, before anybody counts.
            inference.ChatRequest(model=BASE, messages=[generation.ChatMessage(role="user", content="a" * 4096)]),
            "CONTEXT_TOO_LONG",
            None,
        ),
    ],
)
async def test_bad_calls_name_the_field(
    world: World, request_: inference.ChatRequest, reason: str, field: str | None
) -> None:
    with world.caller(), pytest.raises(DomainError) as refused:
        await InferenceServiceStub(world.channel).Chat(request_)
    assert isinstance(refused.value, InvalidArgument)
    assert refused.value.reason == reason
    assert field is None or refused.value.violations[0].field == field
