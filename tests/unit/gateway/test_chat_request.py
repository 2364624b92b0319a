"""Chat requests as OpenAI's clients write them: what is read, what is refused, and by which name."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.errors import InvalidArgument
from services.gateway.http.chat_request import read_chat

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
        n=1,
        tools=None,
        response_format={"type": "text"},
    )
    assert [(m.role, m.content) for m in call.messages] == [("system", "Be brief"), ("user", "ab")]
    assert call.sampling.output_tokens_max == 7
    assert (call.sampling.temperature, call.sampling.top_p, call.sampling.top_k) == (0.0, 0.5, 3)
    assert (list(call.sampling.stop), call.sampling.seed) == (["END"], -5)
    assert (call.sampling.presence_penalty, call.sampling.frequency_penalty) == (1.0, -1.5)
    assert call.stream and call.include_usage


def test_what_is_not_given_stays_unset():
    sampling = read().sampling
    assert not any(sampling.HasField(name) for name in ("output_tokens_max", "temperature", "top_p", "top_k", "seed"))
    assert read(max_completion_tokens=3, max_tokens=9).sampling.output_tokens_max == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
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
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
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
