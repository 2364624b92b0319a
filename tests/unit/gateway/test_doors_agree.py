"""One reader of messages: what a dataset may hold can be asked in a chat, and means the same at both doors."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.errors import InvalidArgument
from finemesh.inference.v1.generation_pb2 import ChatMessage
from formats.line_parser import LineParser
from formats.rows import Conversation, Message
from services.gateway.http.chat_request import read_chat

MESSAGES_MAX = 12
# No request may hold a NUL, so a text with one can be trained and not asked.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=5)
ODD = st.sampled_from([None, "", "x", 0, 1, 0.5, True, [], ["x"], {}, {"x": None}])
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "text", "text", "image_url"]), "text": TEXTS | ODD},
    optional={"image_url": ODD, "cache_control": ODD, "mood": ODD},
)
CONTENTS = st.one_of(TEXTS, TEXTS, st.lists(PARTS | ODD, max_size=3), st.lists(PARTS, min_size=1, max_size=2), ODD)
ARGUMENTS = st.one_of(
    st.sampled_from(['{"a": 1}', '{"a": null}', "{}", "", "{", "[1]", '{"a": NaN}', '{"a": 1, "a": 2}']),
    st.dictionaries(TEXTS, TEXTS | ODD, max_size=2),
    ODD,
)
FUNCTIONS = st.fixed_dictionaries(
    {"name": st.just("f") | ODD}, optional={"arguments": ARGUMENTS, "parsed_arguments": ODD}
)
IDS = st.sampled_from(["c1", "c2"]) | ODD
CALLS = st.fixed_dictionaries(
    {"function": FUNCTIONS}, optional={"id": IDS, "type": st.just("function") | ODD, "index": ODD}
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "assistant", "tool", "function", 7])
MESSAGES = st.fixed_dictionaries(
    {"role": ROLES, "content": CONTENTS},
    optional={
        "name": TEXTS | ODD,
        "weight": ODD,
        "reasoning": TEXTS | ODD,
        "reasoning_content": TEXTS | ODD,
        "tool_calls": st.lists(CALLS, max_size=2) | ODD,
        "tool_call_id": IDS,
        "refusal": ODD,
        "annotations": ODD,
        "audio": ODD,
        "function_call": ODD,
        "parsed": ODD,
        "mood": ODD,
    },
)
PLAIN = st.fixed_dictionaries({"role": ROLES, "content": TEXTS})
# A row needs an answer and a chat does not, so every conversation here has one.
ANSWER = {"role": "assistant", "content": "Ho"}


def of_row(message: Message) -> Any:
    calls = [(call.id or "", call.name, call.arguments) for call in message.tool_calls]
    return message.role, message.content, message.reasoning or "", calls, message.tool_call_id or "", message.name or ""


def of_chat(message: ChatMessage) -> Any:
    calls = [(call.id, call.name, json.loads(call.arguments)) for call in message.tool_calls]
    return message.role, message.content, message.reasoning, calls, message.tool_call_id, message.name


@given(st.lists(PLAIN | MESSAGES | ODD, max_size=4))
@settings(max_examples=500, deadline=None)
def test_both_doors_take_the_same_messages_and_read_them_alike(messages: list[Any]) -> None:
    messages = [*messages, ANSWER]
    parser = LineParser(messages_max=MESSAGES_MAX)
    row = parser.row(1, json.dumps({"messages": messages}).encode())
    try:
        call = read_chat(json.dumps({"model": "m", "messages": messages}).encode(), MESSAGES_MAX)
    except InvalidArgument as refusal:
        assert row is None
        wrong = {f"$.{violation.field}" for violation in refusal.violations}
        assert wrong <= {error.path for error in parser.errors.kept} or "surrogate" in refusal.message
        return
    assert isinstance(row, Conversation), parser.errors.kept
    assert [of_chat(message) for message in call.messages] == [of_row(message) for message in row.messages]


TOOL_KEYS = st.dictionaries(st.sampled_from(["name", "description", "parameters", "strict"]), st.just("f") | ODD)
TOOLS = st.lists(
    st.fixed_dictionaries({"type": st.just("function") | ODD, "function": TOOL_KEYS | ODD}) | ODD, max_size=2
)


@given(TOOLS | TOOLS.map(json.dumps) | ODD)
def test_both_doors_take_the_same_tools_and_tell_them_alike(tools: Any) -> None:
    parser = LineParser()
    row = parser.row(1, json.dumps({"messages": [ANSWER], "tools": tools}).encode())
    try:
        call = read_chat(json.dumps({"model": "m", "messages": [ANSWER], "tools": tools}).encode(), MESSAGES_MAX)
    except InvalidArgument:
        assert row is None
        return
    assert isinstance(row, Conversation), parser.errors.kept
    told = [json.loads(tool.declaration) for tool in call.tools]
    assert [list(tool.items()) for tool in told] == [list(tool.items()) for tool in row.tools]
