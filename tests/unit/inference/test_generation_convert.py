"""What a caller asks becomes what an engine is asked, or every fault is named with its field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chassis.errors import InvalidArgument
from finemesh.inference.v1 import generation_pb2 as pb
from finemesh.inference.v1 import inference_service_pb2 as inference
from formats.line_parser import LineParser
from formats.rows import Conversation
from services.inference.api.generation_convert import chat_from_proto, sampling_from_proto
from services.inference.config import InferenceSettings
from services.inference.engines.answer_form import ResponseKind, ToolUse
from services.inference.engines.base import RequestInvalid, Sampling

SETTINGS = InferenceSettings()
WEATHER = {
    "type": "function",
    "function": {
        "description": "Weather of a town",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
ROW: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Paris?", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "I must ask.",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"town": "Paris", "at": 1}},
                }
            ],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "weather"},
    ],
    "tools": [WEATHER],
}


def asked_as(row: dict[str, Any]) -> inference.ChatRequest:
    """A row of a dataset as a caller asks it."""
    messages = [
        pb.ChatMessage(
            role=message["role"],
            content=message["content"],
            reasoning=message.get("reasoning", ""),
            tool_calls=[
                pb.ToolCall(
                    id=call["id"], name=call["function"]["name"], arguments=json.dumps(call["function"]["arguments"])
                )
                for call in message.get("tool_calls", ())
            ],
            tool_call_id=message.get("tool_call_id", ""),
            name=message.get("name", ""),
        )
        for message in row["messages"]
    ]
    return inference.ChatRequest(
        model="m", messages=messages, tools=[pb.Tool(declaration=json.dumps(tool)) for tool in row["tools"]]
    )


def test_a_row_that_was_trained_is_asked_as_it_was_trained() -> None:
    """Same messages and the declarations with the order of their keys: the template renders the same text."""
    final = {"role": "assistant", "content": "It is sunny."}
    line = json.dumps({**ROW, "messages": [*ROW["messages"], final]})
    row = LineParser().row(1, line.encode())
    assert isinstance(row, Conversation)
    chat = chat_from_proto(asked_as(ROW), SETTINGS)
    assert chat.messages == row.messages[:-1]
    assert json.dumps(chat.form.tools) == json.dumps(row.tools)


def refused(request: inference.ChatRequest) -> list[str]:
    with pytest.raises(InvalidArgument) as caught:
        chat_from_proto(request, SETTINGS)
    return [violation.field for violation in caught.value.violations]


USER = pb.ChatMessage(role="user", content="hi")


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"messages": []}, ["messages"]),
        ({"messages": [pb.ChatMessage(role="robot"), pb.ChatMessage(role="judge")]},
         ["messages[0].role", "messages[1].role"]),
        ({"messages": [pb.ChatMessage(role="user", reasoning="hm", tool_call_id="c")]},
         ["messages[0].reasoning", "messages[0].tool_call_id"]),
        ({"messages": [pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(name="f", arguments="[1]")])]},
         ["messages[0].tool_calls[0].function.arguments"]),
        ({"tools": [pb.Tool(declaration="{")]}, ["tools[0].declaration"]),
        ({"tools": [pb.Tool(declaration='{"type": "function"}')]}, ["tools[0]"]),
        ({"tools": [pb.Tool(declaration=json.dumps(WEATHER))] * 129}, ["tools"]),
        ({"tools": [pb.Tool(declaration=json.dumps(WEATHER))] * 2}, ["tools"]),
        ({"tool_choice": pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)}, ["tool_choice"]),
        ({"tool_choice": pb.ToolChoice(mode=99)}, ["tool_choice.mode"]),  # type: ignore[arg-type]
        ({"tool_choice": pb.ToolChoice(function_name="weather")}, ["tool_choice.function_name"]),
        ({"tools": [pb.Tool(declaration=json.dumps(WEATHER))],
          "tool_choice": pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_FUNCTION, function_name="other")},
         ["tool_choice.function_name"]),
        ({"tools": [pb.Tool(declaration=json.dumps(WEATHER))],
          "tool_choice": pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED),
          "response_format": pb.ResponseFormat(type=pb.RESPONSE_FORMAT_TYPE_JSON_OBJECT)},
         ["response_format"]),
        ({"response_format": pb.ResponseFormat(type=pb.RESPONSE_FORMAT_TYPE_JSON_SCHEMA)},
         ["response_format.json_schema"]),
        ({"response_format": pb.ResponseFormat(json_schema="{}")}, ["response_format.json_schema"]),
        ({"response_format": pb.ResponseFormat(type=pb.RESPONSE_FORMAT_TYPE_JSON_SCHEMA, json_schema="[]")},
         ["response_format.json_schema"]),
    ],
)  # fmt: skip
def test_every_fault_is_named(changes: dict[str, Any], fields: list[str]) -> None:
    assert refused(inference.ChatRequest(**{"model": "m", "messages": [USER], **changes})) == fields


def test_a_schema_is_kept_as_its_author_wrote_it() -> None:
    form = pb.ResponseFormat(type=pb.RESPONSE_FORMAT_TYPE_JSON_SCHEMA, json_schema='{ "type":"object"}')
    asked = chat_from_proto(inference.ChatRequest(messages=[USER], response_format=form), SETTINGS).form
    assert (asked.response, asked.json_schema) == (ResponseKind.JSON_SCHEMA, '{ "type":"object"}')


def test_a_schema_has_a_limit() -> None:
    schema = json.dumps({"const": "x" * SETTINGS.schema_chars_max})
    form = pb.ResponseFormat(type=pb.RESPONSE_FORMAT_TYPE_JSON_SCHEMA, json_schema=schema)
    assert refused(inference.ChatRequest(messages=[USER], response_format=form)) == ["response_format.json_schema"]


def test_a_named_function_is_a_call_that_must_be_made() -> None:
    choice = pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_FUNCTION, function_name="weather")
    tools = [pb.Tool(declaration=json.dumps(WEATHER))]
    form = chat_from_proto(inference.ChatRequest(messages=[USER], tools=tools, tool_choice=choice), SETTINGS).form
    assert (form.tool_use, form.function, form.is_guided) == (ToolUse.REQUIRED, "weather", True)


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (pb.SamplingParameters(choices=17), "n"),
        (pb.SamplingParameters(choices=0), "n"),
        (pb.SamplingParameters(choices=2, temperature=0), "n"),
        (pb.SamplingParameters(output_tokens_min=9), "min_tokens"),
        (pb.SamplingParameters(repetition_penalty=0), "repetition_penalty"),
        (pb.SamplingParameters(min_p=1.5), "min_p"),
        (pb.SamplingParameters(logit_bias={7: 101.0}), "logit_bias[7]"),
        (pb.SamplingParameters(logit_bias={7: float("nan")}), "logit_bias[7]"),
        (pb.SamplingParameters(logit_bias=dict.fromkeys(range(301), 1.0)), "logit_bias"),
        (pb.SamplingParameters(top_logprobs=21), "top_logprobs"),
    ],
)
def test_sampling_outside_its_ranges_is_named(wanted: pb.SamplingParameters, field: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        sampling_from_proto(wanted, 8).check()
    assert caught.value.field_name == field


def test_sampling_that_is_not_set_is_the_default() -> None:
    assert sampling_from_proto(pb.SamplingParameters(), 8) == Sampling(completion_tokens_max=8)
