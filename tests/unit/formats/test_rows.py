"""What a line of a dataset may hold: its format, its features, and every error by its path."""

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.line_parser import LineParser
from formats.row_formats import check_file

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
    (talk({**USER, "content": ["x"]}, ANSWER), ["$.messages[0].content"]),
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
    (calling(index=0), ["$.messages[1].tool_calls[0]"]),
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
    ({**PAIR, "label": None}, ["$.label"]),
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
