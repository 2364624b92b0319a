"""Chat requests as OpenAI's clients write them: what is read, what is refused, and by which name."""

import contextlib
import functools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.errors import InvalidArgument
from finemesh.inference.v1 import generation_pb2 as pb
from finemesh.inference.v1.inference_service_pb2 import ChatRequest
from services.gateway.http.chat_request import read_chat
from services.gateway.http.logprobs_answer import LogprobsForm

HELLO = [{"role": "user", "content": "Hi"}]


def read(**fields: object):
    return read_chat(json.dumps({"model": "m", "messages": HELLO, **fields}).encode(), messages_max=5)


def test_all_parameters_arrive():
    call = read(
        messages=[
            {"role": "developer", "content": "Be brief", "name": "op"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        stop="END",
        seed=-5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        stream=True,
        stream_options={"include_usage": True},
        user="u",
        n=2,
        min_p=0.25,
        repetition_penalty=1.5,
        min_tokens=2,
        ignore_eos=True,
        logit_bias={"7": -1.5},
        logprobs=True,
        top_logprobs=4,
        tools=None,
        response_format={"type": "text"},
    )
    sampling = call.sampling
    assert [(m.role, m.content, m.name) for m in call.messages] == [
        ("system", "Be brief", "op"),
        ("user", "a\nb", ""),
    ]
    assert sampling.output_tokens_max == 7
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 3)
    assert (list(sampling.stop), sampling.seed) == (["END"], -5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.5)
    assert (sampling.choices, sampling.min_p, sampling.repetition_penalty) == (2, 0.25, 1.5)
    assert (sampling.output_tokens_min, sampling.ignore_eos, dict(sampling.logit_bias)) == (2, True, {7: -1.5})
    assert (sampling.top_logprobs, call.logprobs) == (4, LogprobsForm.OPENAI)
    assert call.stream and call.include_usage


def test_what_is_not_given_stays_unset():
    asked = read(n=1, min_tokens=0, ignore_eos=False, logprobs=False, top_logprobs=0).asked(ChatRequest)
    assert [field.name for field, _ in asked.ListFields()] == ["model", "messages", "sampling"]
    assert not asked.sampling.ListFields()
    assert read(max_completion_tokens=3, max_tokens=9).sampling.output_tokens_max == 3


def test_null_says_nothing_wherever_it_stands():
    message = {"role": "assistant", "content": "Oslo", "reasoning_content": None, "refusal": None, "tool_calls": None}
    everything = dict.fromkeys(("tools", "tool_choice", "response_format", "logprobs", "stop", "n", "temprature"))
    call = read(messages=[*HELLO, message, *HELLO], **everything, stream=True, stream_options={"include_usage": None})
    assert [(m.role, m.content) for m in call.messages] == [
        ("user", "Hi"),
        ("assistant", "Oslo"),
        ("user", "Hi"),
    ]
    assert not call.sampling.ListFields()


TOOL = {"type": "function", "function": {"strict": True, "name": "f", "parameters": {"b": 1, "a": None}}}


def test_tools_arrive_in_the_order_of_their_keys_and_so_does_the_choice():
    read_with = functools.partial(read, tools=[TOOL])
    (tool,) = read_with().tools
    assert tool.declaration == '{"type": "function", "function": {"strict": true, "name": "f", "parameters": {"b": 1}}}'
    assert read_with().tool_choice is None
    assert read_with(tool_choice="required").tool_choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED
    assert read_with(tool_choice="none").tool_choice.mode == pb.TOOL_CHOICE_MODE_NONE
    named = read_with(tool_choice={"type": "function", "function": {"name": "f"}}).tool_choice
    assert (named.mode, named.function_name) == (pb.TOOL_CHOICE_MODE_FUNCTION, "f")
    assert read_with(parallel_tool_calls=False).parallel_tool_calls is False
    assert read(tools=[], tool_choice="auto", parallel_tool_calls=False).parallel_tool_calls is None


@pytest.mark.parametrize(
    ("asked", "kind", "schema"),
    [
        ({"type": "json_object"}, pb.RESPONSE_FORMAT_TYPE_JSON_OBJECT, ""),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"b": 1, "a": 2}, "strict": True}},
            pb.RESPONSE_FORMAT_TYPE_JSON_SCHEMA,
            '{"b": 1, "a": 2}',
        ),
        ({"type": "json_schema", "schema": {}}, pb.RESPONSE_FORMAT_TYPE_JSON_SCHEMA, "{}"),
        ({"type": "json_object", "schema": {"a": 2}}, pb.RESPONSE_FORMAT_TYPE_JSON_SCHEMA, '{"a": 2}'),
    ],
)
def test_the_form_of_an_answer_as_openais_and_togethers_clients_write_it(asked, kind, schema):
    form = read(response_format=asked).response_format
    assert (form.type, form.json_schema) == (kind, schema)


def test_together_asks_for_log_probabilities_by_a_number_and_for_thinking_in_two_ways():
    call = read(logprobs=2)
    assert (call.logprobs, call.sampling.top_logprobs) == (LogprobsForm.TOGETHER, 2)
    assert read(reasoning={"enabled": False}).enable_thinking is False
    assert read(chat_template_kwargs={"enable_thinking": True}).enable_thinking is True


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": {}}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "schema": []}}, "response_format.schema"),
        ({"response_format": {"type": "text", "mood": 1}}, "response_format.mood"),
        ({"chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs.mood"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning": {"enabled": False}}, "reasoning.enabled"),
        ({"echo": True}, "echo"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"temprature": 1}, "temprature"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"model": "\ud800"}, "model"),
        ({"model": "a\0"}, "model"),
        ({"user": "\0"}, "user"),
        ({"metadata": {"deep": [{"key\ud800": 1}]}}, "metadata.deep[0].key\ufffd"),
        ({"\ud800": 1}, "\ufffd"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\0"}]}]}, "messages[0].content[0].text"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO * 6}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{**HELLO[0], "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields, param):
    with pytest.raises(InvalidArgument) as told:
        read(**fields)
    assert told.value.violations[0].field == param


@pytest.mark.parametrize("depth", [100, 400, *range(900, 1000, 7), 5000])
def test_brackets_as_deep_as_they_may_be_break_nothing(depth):
    deep = '{"a":' * depth + "1" + "}" * depth
    for place in (
        f'"response_format": {{"type": "json_schema", "schema": {deep}}}',
        f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]',
        f'"metadata": {deep}',
    ):
        with contextlib.suppress(InvalidArgument):
            call = read_chat(f'{{"model": "m", "messages": {json.dumps(HELLO)}, {place}}}'.encode(), messages_max=5)
            assert call.asked(ChatRequest).model == "m"


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_no_body_breaks_it(body):
    with pytest.raises(InvalidArgument):
        read_chat(body, messages_max=5)


BROKEN = (
    b"",
    b"[]",
    b"\xff",
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"temperature": NaN}',
    b'{"temperature": 1e999}',
    b'{"seed": ' + b"1" * 5000 + b"}",
    b'{"n": 1, "n": 1}',
)


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
def test_bodies_that_are_no_object_are_refused(body):
    with pytest.raises(InvalidArgument) as told:
        read_chat(body, messages_max=5)
    assert not re.search(r"sys\.|codec|utf-8-sig", told.value.message)
