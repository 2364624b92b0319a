"""What callers of InferenceService get beside one text: choices, calls of tools, reasoning, probabilities. Every one of
their tokens is metered, and reserved before it is computed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chassis.errors import FailedPrecondition
from finemesh.inference.v1 import generation_pb2 as pb
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.contract.inference.conftest import BASE, World
from tests.contract.inference.scripted_billing import INPUT_NANOS_USD, OUTPUT_NANOS_USD
from tests.contract.inference.test_chat import HELLO, metered
from tests.harness.polling import eventually

WEATHER = pb.Tool(declaration=json.dumps({"type": "function", "function": {"name": "weather"}}))


def put_together(parts: list[inference.StreamChatResponse]) -> list[inference.ChatChoice]:
    """The choices of a stream, as the whole answer has them."""
    choices: dict[int, inference.ChatChoice] = {}
    for part in parts:
        choice = choices.setdefault(part.choice, inference.ChatChoice(index=part.choice))
        choice.message.role = "assistant"
        choice.message.content += part.text_delta
        choice.message.reasoning += part.reasoning_delta
        choice.logprobs.extend(part.logprobs)
        assert not choice.finish_reason, "nothing comes behind the end of a choice"
        choice.finish_reason = part.finish_reason
        for delta in part.tool_calls:
            if delta.index == len(choice.message.tool_calls):
                choice.message.tool_calls.add(id=delta.id, name=delta.name)
            choice.message.tool_calls[delta.index].arguments += delta.arguments_delta
    return [choices[index] for index in sorted(choices)]


async def both_doors(world: World, **fields: Any) -> list[inference.ChatChoice]:
    """The same answer whole and as a stream; both are metered for what they say they used."""
    stub = InferenceServiceStub(world.channel)
    with world.caller():
        whole = await stub.Chat(inference.ChatRequest(model=BASE, messages=HELLO, **fields))
        asked = inference.StreamChatRequest(model=BASE, messages=HELLO, **fields)
        parts = [part async for part in stub.StreamChat(asked)]
    streamed = put_together(parts)
    for one, other in zip(whole.choices, streamed, strict=True):
        for call in (*one.message.tool_calls, *other.message.tool_calls):
            # Made for each generation.
            call.id = "call"
        assert one == other
    assert [part.HasField("usage") for part in parts] == [False] * (len(parts) - 1) + [True]
    records = await metered(world)
    for generation_id, usage in ((whole.generation_id, whole.usage), (parts[0].generation_id, parts[-1].usage)):
        record = records[generation_id]
        assert (record.input_tokens, record.output_tokens) == (usage.input_tokens, usage.output_tokens)
    return list(whole.choices)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    choices=st.integers(1, 4),
    limit=st.integers(1, 12),
    least=st.integers(0, 12),
    stop=st.lists(st.sampled_from(["mesh", "a", "or"]), max_size=2),
    top=st.none() | st.integers(0, 3),
)
async def test_every_token_of_every_choice_is_told_and_metered(
    world: World, choices: int, limit: int, least: int, stop: list[str], top: int | None
) -> None:
    sampling = pb.SamplingParameters(
        choices=choices, output_tokens_max=limit, output_tokens_min=min(least, limit), stop=stop, seed=5,
        top_logprobs=top,
    )  # fmt: skip
    answers = await both_doors(world, sampling=sampling)
    assert len(answers) == choices
    for answer in answers:
        assert answer.finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
        assert (top is None) == (not answer.logprobs)
        assert all(len(token.alternatives) == top for token in answer.logprobs)
        if top is not None:
            assert min(least, limit) <= len(answer.logprobs) <= limit


async def test_a_tool_that_must_be_called_is_called(world: World) -> None:
    choice = pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_FUNCTION, function_name="weather")
    sampling = pb.SamplingParameters(choices=2, seed=1)
    for answer in await both_doors(world, tools=[WEATHER], tool_choice=choice, sampling=sampling):
        (call,) = answer.message.tool_calls
        assert (call.name, answer.message.content, answer.finish_reason) == (
            "weather",
            "",
            pb.FINISH_REASON_TOOL_CALLS,
        )
        assert isinstance(json.loads(call.arguments), dict)


async def test_an_object_and_thoughts_come_apart_from_the_text(world: World) -> None:
    json_object = pb.ResponseFormat(type=pb.RESPONSE_FORMAT_TYPE_JSON_OBJECT)
    (answer,) = await both_doors(world, response_format=json_object, enable_thinking=True)
    assert isinstance(json.loads(answer.message.content), dict)
    assert answer.message.reasoning


async def test_choices_that_are_left_early_are_metered_for_what_they_used(world: World) -> None:
    stub = InferenceServiceStub(world.channel)
    sampling = pb.SamplingParameters(choices=3, output_tokens_max=60, ignore_eos=True)
    with world.caller():
        call = stub.StreamChat(inference.StreamChatRequest(model=BASE, messages=HELLO, sampling=sampling))
        first: Any = await call.read()
        call.cancel()
    records = await eventually(lambda: metered(world), lambda found: first.generation_id in found)
    record = records[first.generation_id]
    assert record.input_tokens == 6
    assert 0 < record.output_tokens <= 3 * 60


async def test_all_choices_are_reserved_before_the_first_token(world: World) -> None:
    """Credit for one answer of ten tokens pays one, and not two."""
    world.billing.credit["org_of_proj_choices"] = 6 * INPUT_NANOS_USD + 10 * OUTPUT_NANOS_USD
    stub = InferenceServiceStub(world.channel)
    with world.caller("proj_choices"):
        for choices, paid in ((2, False), (1, True)):
            sampling = pb.SamplingParameters(choices=choices, output_tokens_max=10)
            request = inference.ChatRequest(model=BASE, messages=HELLO, sampling=sampling)
            if paid:
                await stub.Chat(request)
                continue
            with pytest.raises(FailedPrecondition) as refused:
                await stub.Chat(request)
            assert refused.value.reason == "BALANCE_INSUFFICIENT"
            assert refused.value.metadata["shortfall_nanos_usd"] == str(10 * OUTPUT_NANOS_USD)
