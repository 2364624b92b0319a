"""Tools, choices, forms of answers and log probabilities over HTTP, as the real `openai` client speaks of them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
import pytest_asyncio

from chassis.errors import FieldViolation, InvalidArgument, NotFound, Unavailable
from finemesh.inference.v1 import generation_pb2 as pb
from finemesh.inference.v1 import inference_service_pb2 as service
from tests.contract.gateway.test_http_edge import MODEL, client_of
from tests.contract.gateway.world import World

USER: Any = {"role": "user", "content": "Weather in Oslo and Rome?"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": PARAMETERS}}
ASKED: dict[str, Any] = {"model": MODEL, "messages": [USER]}
USAGE = pb.TokenUsage(input_tokens=5, output_tokens=4)
CALLS = [
    pb.ToolCall(id="call_1", name="weather", arguments='{"city": "Oslo"}'),
    pb.ToolCall(id="call_2", name="weather", arguments='{"city": "Rome"}'),
]
CALLING = service.ChatChoice(
    message=pb.ChatMessage(role="assistant", reasoning="Two cities.", tool_calls=CALLS),
    finish_reason=pb.FINISH_REASON_TOOL_CALLS,
)
LOGPROBS = [
    pb.TokenLogprob(
        token_id=7,
        text="é",
        logprob=-0.5,
        alternatives=[
            pb.TokenLogprob(token_id=7, text="é", logprob=-0.5),
            pb.TokenLogprob(token_id=8, text="b", logprob=-1),
        ],
    ),
    pb.TokenLogprob(
        token_id=9, text="\ufffd", logprob=float("-inf"), alternatives=[pb.TokenLogprob(text="\ufffd", logprob=-2)]
    ),
]


def chat(*choices: service.ChatChoice) -> service.ChatResponse:
    for index, choice in enumerate(choices):
        choice.index = index
    return service.ChatResponse(generation_id="gen-1", model=MODEL, choices=choices, usage=USAGE, revision="rv_1")


def said(text: str, **fields: Any) -> service.ChatChoice:
    message = pb.ChatMessage(role="assistant", content=text)
    return service.ChatChoice(message=message, finish_reason=pb.FINISH_REASON_STOP, **fields)


def part(**fields: Any) -> service.StreamChatResponse:
    return service.StreamChatResponse(generation_id="gen-1", **fields)


def text_part(**fields: Any) -> service.StreamCompleteResponse:
    return service.StreamCompleteResponse(generation_id="gen-1", **fields)


@pytest_asyncio.fixture(loop_scope="session")
async def client(world: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(world) as client:
        yield client


async def test_a_model_calls_tools_and_gets_their_results(world: World, client: openai.AsyncOpenAI) -> None:
    world.inference.whole = chat(CALLING)
    answer = await client.chat.completions.create(
        **ASKED, tools=[TOOL], tool_choice="required", parallel_tool_calls=True
    )
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    assert [
        (call.id, call.type, call.function.name, call.function.arguments)
        for call in choice.message.tool_calls
        if call.type == "function"
    ] == [("call_1", "function", "weather", '{"city": "Oslo"}'), ("call_2", "function", "weather", '{"city": "Rome"}')]
    extra = choice.message.model_extra or {}
    assert extra["reasoning_content"] == extra["reasoning"] == "Two cities."
    asked = world.inference.request
    assert [json.loads(tool.declaration) for tool in asked.tools] == [TOOL]
    assert (asked.tool_choice.mode, asked.parallel_tool_calls) == (pb.TOOL_CHOICE_MODE_REQUIRED, True)

    # The answer goes back as the client dumps it, with a null for everything that it could have said.
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "7 C"} for call in CALLS]
    world.inference.whole = chat(said("Mild."))
    dumped: Any = choice.message.model_dump()
    assert None in dumped.values()
    answer = await client.chat.completions.create(model=MODEL, messages=[USER, dumped, *results], tools=[TOOL])
    assert answer.choices[0].message.content == "Mild."
    told = world.inference.request.messages
    assert [(message.role, message.content) for message in told] == [
        ("user", USER["content"]),
        ("assistant", ""),
        ("tool", "7 C"),
        ("tool", "7 C"),
    ]
    assert list(told[1].tool_calls) == CALLS
    assert (told[1].reasoning, told[2].tool_call_id, told[3].tool_call_id) == ("Two cities.", "call_1", "call_2")


async def test_calls_of_tools_are_streamed_and_what_the_client_adds_up_can_be_sent_back(
    world: World, client: openai.AsyncOpenAI
) -> None:
    deltas = [
        service.ToolCallDelta(index=0, id="call_1", name="weather"),
        service.ToolCallDelta(index=0, arguments_delta='{"city": '),
        service.ToolCallDelta(index=0, arguments_delta='"Oslo"}'),
        service.ToolCallDelta(index=1, id="call_2", name="weather", arguments_delta='{"city": "Rome"}'),
    ]
    world.inference.parts = [
        part(reasoning_delta="Two ", revision="rv_1"),
        part(reasoning_delta="cities."),
        *(part(tool_calls=[delta]) for delta in deltas),
        part(finish_reason=pb.FINISH_REASON_TOOL_CALLS, usage=USAGE),
    ]
    async with client.chat.completions.stream(**ASKED, tools=[TOOL], stream_options={"include_usage": True}) as stream:
        done = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
        whole = await stream.get_final_completion()
    assert [(event.index, event.name, event.parsed_arguments) for event in done] == [
        (0, "weather", {"city": "Oslo"}),
        (1, "weather", {"city": "Rome"}),
    ]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 4)
    assert whole.choices[0].finish_reason == "tool_calls"
    message: Any = whole.choices[0].message.model_dump()
    assert message["reasoning_content"] == "Two cities."
    assert message["tool_calls"][0]["function"]["parsed_arguments"] == {"city": "Oslo"}
    world.inference.parts = None
    await client.chat.completions.create(model=MODEL, messages=[USER, message])
    assert list(world.inference.request.messages[1].tool_calls) == CALLS
    assert world.inference.request.messages[1].reasoning == "Two cities."


class Weather(pydantic.BaseModel):
    city: str
    celsius: int


async def test_a_schema_is_asked_for_and_its_answer_is_parsed(world: World, client: openai.AsyncOpenAI) -> None:
    world.inference.whole = chat(said('{"city": "Oslo", "celsius": 7}'))
    answer = await client.chat.completions.parse(**ASKED, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Oslo", celsius=7)
    answered: Any = answer.choices[0].message.model_dump(warnings=False)
    form = world.inference.request.response_format
    assert form.type == pb.RESPONSE_FORMAT_TYPE_JSON_SCHEMA
    assert json.loads(form.json_schema)["required"] == ["city", "celsius"]
    assert list(json.loads(form.json_schema)["properties"]) == ["city", "celsius"]
    await client.chat.completions.create(model=MODEL, messages=[USER, answered, USER])
    assert world.inference.request.messages[1].content == '{"city": "Oslo", "celsius": 7}'


async def test_several_answers_have_log_probabilities_and_one_usage(world: World, client: openai.AsyncOpenAI) -> None:
    world.inference.whole = chat(said("éx", logprobs=LOGPROBS), said("b"))
    answer = await client.chat.completions.create(**ASKED, n=2, logprobs=True, top_logprobs=2, logit_bias={"9": -100})
    asked = world.inference.request.sampling
    assert (asked.choices, asked.top_logprobs, dict(asked.logit_bias)) == (2, 2, {9: -100.0})
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "éx"), (1, "b")]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(token.token, token.logprob, token.bytes) for token in logprobs.content] == [
        ("é", -0.5, [0xC3, 0xA9]),
        ("\ufffd", -9999.0, None),
    ]
    assert [token.token for token in logprobs.content[0].top_logprobs] == ["é", "b"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 9


async def test_several_streamed_answers_begin_and_end_each_by_itself(world: World, client: openai.AsyncOpenAI) -> None:
    world.inference.parts = [
        part(text_delta="a", choice=1, revision="rv_1", logprobs=LOGPROBS[:1]),
        part(text_delta="b", choice=0),
        part(text_delta="c", choice=1),
        part(finish_reason=pb.FINISH_REASON_LENGTH, choice=1),
        part(text_delta="d", finish_reason=pb.FINISH_REASON_STOP, choice=0, usage=USAGE),
    ]
    stream = await client.chat.completions.create(
        **ASKED, n=2, logprobs=True, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert [(c.index, c.delta.role, c.delta.content, c.finish_reason) for c in choices] == [
        (1, "assistant", "", None),
        (1, None, "a", None),
        (0, "assistant", "", None),
        (0, None, "b", None),
        (1, None, "c", None),
        (1, None, None, "length"),
        (0, None, "d", None),
        (0, None, None, "stop"),
    ]
    logprobs = choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.token for token in logprobs.content] == ["é"]
    assert {chunk.system_fingerprint for chunk in chunks} == {"rv_1"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


async def test_together_gets_log_probabilities_in_its_own_form(world: World) -> None:
    world.inference.whole = chat(said("éx", logprobs=LOGPROBS))
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {world.acme.secret}"}) as http:
        url = f"http://127.0.0.1:{world.http_port}/v1/chat/completions"
        answer = (await http.post(url, json={**ASKED, "logprobs": 1})).json()
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["é", "\ufffd"],
        "token_logprobs": [-0.5, -9999.0],
        "token_ids": [7, 9],
        "top_logprobs": [{"é": -0.5, "b": -1.0}, {"\ufffd": -2.0}],
    }


async def test_a_text_is_continued(world: World, client: openai.AsyncOpenAI) -> None:
    world.inference.whole = service.CompleteResponse(
        generation_id="gen-1",
        model=MODEL,
        choices=[
            service.CompletionChoice(text="éx", finish_reason=pb.FINISH_REASON_LENGTH, logprobs=LOGPROBS),
            service.CompletionChoice(index=1, text="b", finish_reason=pb.FINISH_REASON_STOP),
        ],
        usage=USAGE,
        revision="rv_1",
    )
    answer = await client.completions.create(model=MODEL, prompt="Once", n=2, logprobs=2, max_tokens=9, seed=1)
    assert (answer.id, answer.object, answer.system_fingerprint) == ("gen-1", "text_completion", "rv_1")
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, "éx", "length"), (1, "b", "stop")]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.text_offset, logprobs.tokens, logprobs.token_logprobs) == (
        [0, 1],
        ["é", "\ufffd"],
        [-0.5, -9999.0],
    )
    assert logprobs.top_logprobs == [{"é": -0.5, "b": -1.0}, {"\ufffd": -2.0}]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 4, 9)
    asked = world.inference.request
    assert (asked.model, asked.prompt, asked.sampling.choices, asked.sampling.output_tokens_max) == (
        MODEL,
        "Once",
        2,
        9,
    )
    assert world.inference.caller is not None
    assert world.inference.caller.tenant == world.acme.project_id
    echoed = await client.completions.create(model=MODEL, prompt="Once", n=2, echo=True)
    assert [choice.text for choice in echoed.choices] == ["Onceéx", "Onceb"]
    assert echoed.choices[0].logprobs is None


async def test_a_continuation_is_streamed(world: World, client: openai.AsyncOpenAI) -> None:
    world.inference.parts = [
        text_part(text_delta="é", revision="rv_1", logprobs=LOGPROBS[:1]),
        text_part(text_delta="x", choice=1),
        text_part(text_delta="y", logprobs=LOGPROBS[1:], finish_reason=pb.FINISH_REASON_STOP),
        text_part(choice=1, finish_reason=pb.FINISH_REASON_LENGTH, usage=USAGE),
    ]
    asked: dict[str, Any] = {"model": MODEL, "prompt": "Once", "stream_options": {"include_usage": True}}
    stream = await client.completions.create(**asked, logprobs=1, stream=True)
    chunks = [chunk async for chunk in stream]
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert [(c.index, c.text, c.finish_reason, c.logprobs and c.logprobs.text_offset) for c in choices] == [
        (0, "é", None, [0]),
        (1, "x", None, None),
        (0, "y", "stop", [1]),
        (1, "", "length", None),
    ]
    assert chunks[-1].usage is not None
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 9)
    echoed = [chunk async for chunk in await client.completions.create(**asked, echo=True, stream=True)]
    assert [chunk.choices[0].text for chunk in echoed[:-1]] == ["Onceé", "Oncex", "y", ""]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "param"),
    [
        (NotFound("MODEL_UNKNOWN", "no such model"), 404, None),
        (InvalidArgument("INVALID_FIELD", "many", violations=[FieldViolation("sampling.choices", "many")]), 400, "n"),
        (
            InvalidArgument("INVALID_FIELD", "x", violations=[FieldViolation("tools[0].declaration", "x")]),
            400,
            "tools[0]",
        ),
        (Unavailable("ENGINE_FAILED", "engine died"), 503, None),
    ],
)
async def test_failures_of_a_continuation_have_openais_shape(world: World, client, failure, status, param, stream):
    world.inference.failure = failure
    with pytest.raises(openai.APIStatusError) as told:
        await client.completions.create(model=MODEL, prompt="Once", stream=stream)
    assert (told.value.status_code, told.value.param) == (status, param)


async def test_a_continuation_that_breaks_off_is_raised_by_the_client(world: World, client: openai.AsyncOpenAI) -> None:
    world.inference.parts = [text_part(text_delta="a"), text_part(text_delta="b")]
    world.inference.failure_later = Unavailable("ENGINE_FAILED", "the engine stopped")
    stream = await client.completions.create(model=MODEL, prompt="Once", stream=True)
    with pytest.raises(openai.APIError, match="the engine stopped"):
        async for _ in stream:
            continue


async def test_a_tool_that_is_none_and_a_message_that_is_wrong_are_named(client: openai.AsyncOpenAI) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {"parameters": PARAMETERS}}]}),
        ("messages[0].tool_call_id", {"messages": [{"role": "tool", "tool_call_id": "c9", "content": "7"}]}),
    ]
    for param, fields in wrong:
        with pytest.raises(openai.BadRequestError) as told:
            await client.chat.completions.create(**{**ASKED, **fields})
        assert told.value.param == param
