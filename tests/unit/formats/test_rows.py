"""What a line of a dataset may hold: its format, its features, and every error by its path."""

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.line_parser import LineParser
from formats.row_formats import check_file
from formats.rows import Conversation

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "7"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PAIR = {"prompt": "p", "completion": "c"}
JUDGED = {"prompt": [USER], "completion": [ANSWER], "label": True}
CHOICE = {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}


def talk(*messages: Any, **keys: Any) -> dict[str, Any]:
    return {"messages": list(messages), **keys}


def calling(**changes: Any) -> dict[str, Any]:
    return talk(USER, {**CALLING, "tool_calls": [{**CALL, **changes}]})


def function(**changes: Any) -> dict[str, Any]:
    return calling(function={**CALL["function"], **changes})  # type: ignore[dict-item]


GOOD: list[tuple[Any, str, set[str]]] = [
    (talk(USER, ANSWER), "conversation", set()),
    (talk(USER, ANSWER, id=7, parallel_tool_calls=False), "conversation", set()),
    (talk(USER, ANSWER, tools=None), "conversation", set()),
    (talk(USER, ANSWER, tools=[]), "conversation", set()),
    (talk(USER, ANSWER, tools=[TOOL]), "conversation", {"tools"}),
    (talk(USER, ANSWER, tools=json.dumps([TOOL])), "conversation", {"tools"}),
    (talk(USER, CALLING, RESULT, ANSWER, tools=[TOOL]), "conversation", {"tools"}),
    (talk(USER, {**CALLING, "content": None}), "conversation", {"tools"}),
    (talk(USER, {**CALLING, "tool_calls": [CALL, CALL]}), "conversation", {"tools", "parallel_tool_calls"}),
    (talk(USER, {"role": "tool", "content": "7"}, ANSWER), "conversation", set()),
    (function(arguments={"a": [1]}), "conversation", {"tools"}),
    (function(arguments=None), "conversation", {"tools"}),
    (talk(USER, {**ANSWER, "reasoning": "hm"}), "conversation", {"reasoning"}),
    (talk(USER, {**ANSWER, "reasoning_content": "hm"}), "conversation", {"reasoning"}),
    (talk(USER, {**ANSWER, "reasoning": ""}), "conversation", set()),
    (talk(USER, {**ANSWER, "weight": 0}, ANSWER), "conversation", {"message_weights"}),
    (talk(USER, {**ANSWER, "weight": 1}), "conversation", set()),
    (talk(USER, ANSWER, weight=0.5), "conversation", {"sample_weights"}),
    (talk(USER, ANSWER, weight=1), "conversation", set()),
    (PAIR, "instruction", set()),
    ({**PAIR, "prompt": "", "weight": 2}, "instruction", {"sample_weights"}),
    ({"text": "t"}, "text", set()),
    (CHOICE, "preference", set()),
    (
        {**CHOICE, "input": {"messages": [USER], "tools": [TOOL]}, "weight": 0},
        "preference",
        {"tools", "sample_weights"},
    ),
    ({**CHOICE, "preferred_output": [CALLING, RESULT, ANSWER]}, "preference", {"tools"}),
    (JUDGED, "feedback", {"thumbs_up"}),
    ({**JUDGED, "label": False, "weight": 2}, "feedback", {"thumbs_down", "sample_weights"}),
    ({**PAIR, "label": True}, "feedback", {"thumbs_up"}),
    ({**PAIR, "prompt": "", "label": False}, "feedback", {"thumbs_down"}),
    ({**JUDGED, "tools": [TOOL], "completion": [CALLING, RESULT, ANSWER]}, "feedback", {"thumbs_up", "tools"}),
    (
        {**JUDGED, "completion": [{**CALLING, "weight": 0}, ANSWER]},
        "feedback",
        {"thumbs_up", "tools", "message_weights"},
    ),
    ({**PAIR, "label": None}, "instruction", set()),
    (talk(USER, {"role": "system", "content": "s"}, ANSWER), "conversation", set()),
    (talk({"role": "developer", "content": "s"}, {**USER, "name": "ann"}, ANSWER), "conversation", set()),
    (talk({**USER, "content": [{"type": "text", "text": "a"}]}, {**ANSWER, "tool_calls": []}), "conversation", set()),
    (calling(index=0), "conversation", {"tools"}),
    (talk(USER, {**ANSWER, "parsed": {"a": 1}}), "conversation", set()),
    (function(parsed_arguments={"a": 1}), "conversation", {"tools"}),
    # As Arrow writes rows whose column holds other ones, too.
    (
        talk(
            {**USER, "tool_calls": None, "tool_call_id": None, "name": None, "weight": None, "reasoning": None},
            {**ANSWER, "tool_calls": None, "tool_call_id": None, "name": None, "weight": None, "reasoning": None},
            tools=None,
            prompt=None,
            functions=None,
            input_ids=None,
            weight=None,
        ),
        "conversation",
        set(),
    ),
    # As the openai client dumps an answer.
    (
        talk(USER, {**ANSWER, "refusal": None, "audio": None, "annotations": [], "function_call": None}),
        "conversation",
        set(),
    ),
    (talk(USER, {**CALLING, "content": None, "refusal": None, "annotations": []}), "conversation", {"tools"}),
    (talk(USER, {**ANSWER, "reasoning": "hm", "reasoning_content": "hm"}), "conversation", {"reasoning"}),
    # A label is that of feedback beside a prompt or a completion alone.
    ({"text": "t", "label": 3}, "text", set()),
    (talk(USER, ANSWER, label="good"), "conversation", set()),
]

BAD: list[tuple[Any, list[str]]] = [
    ([], ["$"]),
    ({}, ["$"]),
    ({"words": "x"}, ["$"]),
    ({**PAIR, "text": "x"}, ["$"]),
    (talk(USER, ANSWER, prompt="x"), ["$"]),
    (talk(USER, ANSWER, functions=[]), ["$.functions"]),
    (talk(USER, ANSWER, input_ids=[1]), ["$.input_ids"]),
    (talk(USER, ANSWER, weight=-0.5), ["$.weight"]),
    (talk(USER, ANSWER, weight=101), ["$.weight"]),
    (talk(USER, ANSWER, weight=True), ["$.weight"]),
    (talk(USER, ANSWER, weight="1"), ["$.weight"]),
    (talk(USER, ANSWER, tools={}), ["$.tools"]),
    (talk(USER, ANSWER, tools=""), ["$.tools"]),
    (talk(USER, ANSWER, tools=json.dumps(TOOL)), ["$.tools"]),
    (talk(USER, ANSWER, tools='[{"function": {"name": "f"}}]'), ["$.tools[0].type"]),
    (talk(USER, ANSWER, tools=[TOOL] * 129), ["$.tools"]),
    (talk(USER, ANSWER, tools=["f"]), ["$.tools[0]"]),
    (talk(USER, ANSWER, tools=[{"function": {"name": "f"}}]), ["$.tools[0].type"]),
    (talk(USER, ANSWER, tools=[{**TOOL, "function": {"name": ""}}]), ["$.tools[0].function.name"]),
    (
        talk(USER, ANSWER, tools=[{**TOOL, "function": {"name": "f", "parameters": []}}]),
        ["$.tools[0].function.parameters"],
    ),
    (talk(USER, ANSWER, tools=[{**TOOL, "x": "\ud800"}]), ["$.tools[0]"]),
    ({**PAIR, "tools": [TOOL]}, ["$.tools"]),
    ({**CHOICE, "tools": [TOOL]}, ["$.tools"]),
    (talk(), ["$.messages"]),
    (talk(USER), ["$.messages"]),
    (talk(*[ANSWER] * 1001), ["$.messages"]),
    (talk(USER, 3, ANSWER), ["$.messages[1]"]),
    (talk({**USER, "role": "function"}, ANSWER), ["$.messages[0].role"]),
    (talk({**USER, "content": ["x"]}, ANSWER), ["$.messages[0].content[0]"]),
    (talk({**USER, "content": []}, ANSWER), ["$.messages[0].content"]),
    (talk({**USER, "content": [{"type": "text"}, {"type": "image_url"}]}, ANSWER),
        ["$.messages[0].content[0].text", "$.messages[0].content[1]"]),
    (talk({**USER, "content": [{"type": "text", "text": "x", "mood": 1}]}, ANSWER), ["$.messages[0].content[0].mood"]),
    (talk({**USER, "content": [{"type": "text", "text": "\ud800"}]}, ANSWER), ["$.messages[0].content[0].text"]),
    (talk({**USER, "name": 7}, ANSWER), ["$.messages[0].name"]),
    (talk(USER, {**ANSWER, "refusal": "no"}), ["$.messages[1].refusal"]),
    (talk({**USER, "tool_calls": [CALL]}, ANSWER), ["$.messages[0].tool_calls"]),
    (talk({**USER, "reasoning": "x"}, ANSWER), ["$.messages[0].reasoning"]),
    (talk({**USER, "\x00": 1}, ANSWER), ["$.messages[0].\\x00"]),
    (talk(USER, {"role": "assistant"}), ["$.messages[1].content"]),
    (talk(USER, {"role": "assistant", "content": None}), ["$.messages[1].content"]),
    (talk(USER, {**ANSWER, "reasoning": "a", "reasoning_content": "b"}), ["$.messages[1].reasoning_content"]),
    (talk(USER, {**ANSWER, "reasoning": 7}), ["$.messages[1].reasoning"]),
    (talk(USER, {**CALLING, "tool_calls": {}}), ["$.messages[1].content", "$.messages[1].tool_calls"]),
    (talk(USER, {**CALLING, "tool_calls": "f"}), ["$.messages[1].tool_calls"]),
    (talk(USER, {**CALLING, "tool_calls": [CALL] * 129}), ["$.messages[1].tool_calls"]),
    (talk(USER, {**CALLING, "tool_calls": [{}]}), ["$.messages[1].tool_calls[0]"]),
    (calling(type="web"), ["$.messages[1].tool_calls[0].type"]),
    (calling(id=3), ["$.messages[1].tool_calls[0].id"]),
    (calling(index="0"), ["$.messages[1].tool_calls[0].index"]),
    (calling(place=0), ["$.messages[1].tool_calls[0]"]),
    (function(name=None), ["$.messages[1].tool_calls[0].function.name"]),
    (function(arguments="[1]"), ["$.messages[1].tool_calls[0].function.arguments"]),
    (function(arguments="{"), ["$.messages[1].tool_calls[0].function.arguments"]),
    (function(arguments='{"a": NaN}'), ["$.messages[1].tool_calls[0].function.arguments"]),
    (function(arguments='{"a": 1, "a": 2}'), ["$.messages[1].tool_calls[0].function.arguments"]),
    (function(arguments='{"a": 1e999}'), ["$.messages[1].tool_calls[0].function.arguments"]),
    (function(arguments={"a": "\udfff"}), ["$.messages[1].tool_calls[0].function.arguments"]),
    (function(strict=True), ["$.messages[1].tool_calls[0].function"]),
    (talk(USER, CALLING, {**RESULT, "tool_call_id": "c2"}, ANSWER), ["$.messages[2].tool_call_id"]),
    (talk(USER, {"role": "tool", "tool_call_id": "c1", "content": "early"}, CALLING), ["$.messages[1].tool_call_id"]),
    (talk(USER, CALLING, {**RESULT, "content": None}, ANSWER), ["$.messages[2].content"]),
    ({"prompt": "p"}, ["$.completion"]),
    ({"text": ""}, ["$.text"]),
    ({"text": 1}, ["$.text"]),
    ({**CHOICE, "input": [USER]}, ["$.input"]),
    ({**CHOICE, "input": {}}, ["$.input.messages"]),
    ({**CHOICE, "input": {"messages": [USER, ANSWER]}}, ["$.input.messages"]),
    ({**CHOICE, "preferred_output": []}, ["$.preferred_output"]),
    ({**CHOICE, "preferred_output": "Ho"}, ["$.preferred_output"]),
    ({**CHOICE, "preferred_output": [USER]}, ["$.preferred_output[0].role"]),
    ({**CHOICE, "preferred_output": [CALLING, RESULT]}, ["$.preferred_output"]),
    (
        {**CHOICE, "non_preferred_output": [{**RESULT, "tool_call_id": "c9"}, ANSWER]},
        ["$.non_preferred_output[0].tool_call_id"],
    ),
    ({key: CHOICE[key] for key in ("input", "preferred_output")}, ["$.non_preferred_output"]),
    ({**JUDGED, "label": "up"}, ["$.label"]),
    ({**JUDGED, "label": 1}, ["$.label"]),
    ({**JUDGED, "prompt": []}, ["$.prompt"]),
    ({**JUDGED, "prompt": [USER, ANSWER]}, ["$.prompt"]),
    ({**JUDGED, "prompt": [{**USER, "role": "human"}]}, ["$.prompt[0].role"]),
    ({**JUDGED, "prompt": "p"}, ["$.prompt"]),
    ({**JUDGED, "completion": "c"}, ["$.completion"]),
    ({**JUDGED, "completion": [USER]}, ["$.completion[0].role"]),
    ({**JUDGED, "completion": [CALLING, RESULT]}, ["$.completion"]),
    ({**PAIR, "completion": "", "label": False}, ["$.completion"]),
    ({**PAIR, "label": True, "tools": [TOOL]}, ["$.tools"]),
    ({"completion": "c", "label": True}, ["$.prompt"]),
    ({**PAIR, "label": True, "messages": [USER, ANSWER]}, ["$"]),
]  # fmt: skip


def test_parts_of_a_content_are_lines_of_one_text() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b\n", "image_url": None},
        {"type": "text", "text": ""},
    ]
    parser = LineParser()
    row = parser.row(1, lines(talk({**USER, "content": parts}, ANSWER)))
    assert isinstance(row, Conversation)
    assert row.messages[0].content == "a\nb\n\n"


def test_a_developer_is_the_system_and_everybody_may_have_a_name() -> None:
    row = LineParser().row(1, lines(talk({"role": "developer", "content": "s", "name": "op"}, ANSWER)))
    assert isinstance(row, Conversation)
    assert (row.messages[0].role, row.messages[0].name) == ("system", "op")


def test_what_arrow_adds_to_tools_and_calls_is_left_out_and_a_default_of_null_stays() -> None:
    properties = {"city": {"type": "string", "enum": ["a", None], "default": None, "items": None}, "default": None}
    tool = {"type": "function", "function": {"name": "f", "strict": None, "parameters": {"properties": properties}}}
    calls = [
        {**CALL, "function": {"name": "f", "arguments": {"city": "Oslo", "day": None, "deep": [{"x": None}, None]}}},
        {**CALL, "function": {"name": "f", "arguments": '{"city": null}'}},
    ]
    row = LineParser().row(1, lines(talk(USER, {**CALLING, "tool_calls": calls}, tools=[tool])))
    assert isinstance(row, Conversation)
    assert row.tools[0]["function"] == {
        "name": "f",
        "parameters": {"properties": {"city": {"type": "string", "enum": ["a", None], "default": None}}},
    }
    assert [call.arguments for call in row.messages[1].tool_calls] == [
        {"city": "Oslo", "deep": [{}, None]},
        {"city": None},
    ]


ARROW_KEYS = (
    "name",
    "weight",
    "reasoning",
    "reasoning_content",
    "tool_calls",
    "tool_call_id",
    "refusal",
    "mood",
    "\u0000",
)


def with_nulls(value: Any, keys: list[str]) -> Any:
    """The value as Arrow writes it: objects have the keys of others, each null."""
    if isinstance(value, list):
        return [with_nulls(each, keys) for each in value]
    if not isinstance(value, dict):
        return value
    return dict.fromkeys(keys) | {key: with_nulls(each, keys) for key, each in value.items()}


@given(st.sampled_from([row for row, _, _ in GOOD]), st.lists(st.sampled_from([*ARROW_KEYS, "text", "input", "type"])))
def test_keys_that_are_null_change_nothing(row: Any, keys: list[str]) -> None:
    plain, padded = LineParser(), LineParser()
    assert padded.row(1, lines(with_nulls(row, keys))) == plain.row(1, lines(row)) is not None
    assert (padded.expected, padded.features) == (plain.expected, plain.features)


FOREIGN: list[tuple[Any, str, str]] = [
    ({"instruction": "i", "input": "x", "output": "o"}, "Alpaca", '{"messages": ['),
    ({"instruction": "i", "output": "o"}, "Alpaca", '{"messages": ['),
    ({"instruction": "i", "input": "x", "output": "o", "text": "t"}, "Alpaca", '{"messages": ['),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "`chosen`", '"preferred_output": CHOSEN'),
    ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "`chosen`", '"preferred_output": CHOSEN'),
    ({"conversations": [{"from": "human", "value": "q"}]}, "ShareGPT", "rename `conversations` to `messages`, `from`"),
    ({"conversations": [USER, ANSWER]}, "`conversations`", "rename `conversations` to `messages`"),
    ({"prompt": [USER], "completion": [ANSWER]}, "of messages", "PROMPT + COMPLETION"),
    ({"contents": [{"role": "user", "parts": [{"text": "q"}]}]}, "Gemini", '{"messages": ['),
    ({"custom_id": "1", "method": "POST", "url": "/v1", "body": {}}, "a batch", '{"messages": ['),
    ({"question": "q", "answer": "a"}, "`question` with `answer`", '"content": QUESTION}'),
    ({"prompt": "q", "response": "a"}, "`prompt` with `response`", '"content": PROMPT}'),
]


@pytest.mark.parametrize(("document", "name", "cure"), FOREIGN)
def test_rows_of_a_foreign_format_are_one_error_with_the_keys_to_use(document: Any, name: str, cure: str) -> None:
    parser, sound = parsed(lines(document, document, document))
    (error,) = parser.errors.kept
    assert (sound, parser.errors.count, error.line, error.path) == (0, 1, 1, "$")
    assert name in error.expectation
    assert cure in error.expectation


def test_other_keys_beside_a_format_make_no_foreign_row() -> None:
    parser, sound = parsed(
        lines(talk(USER, ANSWER, instruction="i", output="o", chosen=1, rejected=2, question="q", answer=1))
    )
    assert (sound, parser.errors.count) == (1, 0)


def parsed(content: bytes) -> tuple[LineParser, int]:
    """The parser after all lines that hold something, and how many of them are sound."""
    parser = LineParser(errors_max=1000)
    rows = [parser.row(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    return parser, sum(row is not None for row in rows)


def places(parser: LineParser) -> list[tuple[int, str]]:
    return sorted((error.line, error.path) for error in parser.errors.kept)


def lines(*documents: Any) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


@pytest.mark.parametrize(("document", "kind", "used"), GOOD)
def test_a_good_line_has_a_format_and_features(document: Any, kind: str, used: set[str]) -> None:
    parser, sound = parsed(lines(document))
    assert (parser.expected, places(parser), sound) == (kind, [], 1)
    assert {name for name, on in asdict(parser.features).items() if on} == used == set(parser.features.used())


@pytest.mark.parametrize(("document", "paths"), BAD)
def test_a_bad_line_is_refused_at_all_its_places(document: Any, paths: list[str]) -> None:
    parser, sound = parsed(lines(document))
    assert places(parser) == [(1, path) for path in sorted(paths)]
    assert sound == 0
    for error in parser.errors.kept:
        assert error.found
        assert error.verdict == f"{error.expectation}; found {error.found}"


@pytest.mark.parametrize(
    ("content", "lines_wrong"),
    [
        (b"\xef\xbb\xbf" + lines(PAIR), [1]),
        (lines(PAIR) + b"\xff\n", [2]),
        (lines(PAIR) + b"{oops}\n", [2]),
        (lines(PAIR) + b'{"prompt": NaN, "completion": "x"}', [2]),
        (b'{"text": "said", "text": "dropped"}', [1]),
        (
            b'{"messages": [{"role": "system", "role": "user", "content": "q"}, '
            b'{"role": "assistant", "content": "a"}]}',
            [1],
        ),
        (b'{"text": "t", "note": {"\\ud800": 1, "\\ud800": 2}}', [1]),
        (b'{"text": "t", "weight": 1e999}', [1]),
        (b'{"text": "t", "note": [-1e999]}', [1]),
        (lines(PAIR, talk(USER, ANSWER), PAIR, {"text": "x"}), [2, 4]),
        (lines({"prompt": "p"}, talk(USER, ANSWER), PAIR), [1, 2]),
        (b"\n \n\t\n" + lines(PAIR)[:-1] + b"\n1", [5]),
        (b"[" * 100_000, [1]),
    ],
)
def test_lines_that_are_no_rows_are_refused(content: bytes, lines_wrong: list[int]) -> None:
    parser, _ = parsed(content)
    assert [line for line, _ in places(parser)] == lines_wrong


KEYS = (
    "messages", "role", "content", "weight", "prompt", "completion", "text", "tools", "tool_calls", "function", "name",
    "arguments", "id", "type", "reasoning", "tool_call_id", "input", "preferred_output", "non_preferred_output",
)  # fmt: skip
DOCUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.text(max_size=4)
    | st.sampled_from([USER, ANSWER, CALLING, RESULT]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS) | st.text(max_size=3),
            inner | st.sampled_from(["user", "assistant", "system", "tool", "function"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)
TALKS = st.builds(talk, st.just(USER), DOCUMENTS, DOCUMENTS)


@given(st.lists(DOCUMENTS | TALKS | st.sampled_from([row for row, _, _ in GOOD]), max_size=5))
@settings(max_examples=200, deadline=None)
def test_every_line_is_a_row_or_has_errors(rows: list[Any]) -> None:
    parser, sound = parsed(lines(*rows))
    assert sound + len({line for line, _ in places(parser)}) == len(rows)


@pytest.mark.parametrize("label", [True, False])
def test_a_file_with_thumbs_of_one_kind_is_refused_and_told_what_to_do(label: bool) -> None:
    parser, _ = parsed(lines({**JUDGED, "label": label}, {**PAIR, "label": label}))
    check_file(parser.expected, parser.features, parser.errors)
    (error,) = parser.errors.kept
    assert (error.line, error.path, error.found) == (0, "$.label", f"only rows with label {str(label).lower()}")
    assert "add rows of the other kind, or train on good answers alone with the method sft" in error.expectation


def test_a_file_with_both_thumbs_is_sound_and_one_with_broken_rows_is_not_judged_by_them() -> None:
    for rows, errors in (([JUDGED, {**PAIR, "label": False}], 0), ([JUDGED, {**PAIR, "label": 0}], 1)):
        parser, _ = parsed(lines(*rows))
        check_file(parser.expected, parser.features, parser.errors)
        assert parser.errors.count == errors


def test_feedback_is_not_mixed_with_other_rows() -> None:
    parser, _ = parsed(lines(JUDGED, PAIR, CHOICE))
    assert [(error.line, error.expectation) for error in parser.errors.kept] == [
        (line, "a row of the feedback format like the rows before it") for line in (2, 3)
    ]
