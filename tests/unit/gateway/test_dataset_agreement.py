"""The gateway's check and the trainer's reader give the same verdict on every file: format,
faults with their places, features."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.content_check import ContentCheck, ParquetLimits
from services.gateway.dataset_check import DatasetCheck, DatasetLimits, FoundErrors
from services.gateway.parquet_check import check_tokens
from services.trainer.train.data.rows.row_reader import RowReader
from services.trainer.train.data.rows.row_types import LINE_BYTES_MAX, MESSAGES_MAX, ROWS_MAX

LIMITS = DatasetLimits(line_bytes_max=LINE_BYTES_MAX, lines_max=ROWS_MAX, messages_max=MESSAGES_MAX, errors_max=1000)
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "7"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PAIR = {"prompt": "p", "completion": "c"}
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
]  # fmt: skip


def both(folder: Path, content: bytes) -> tuple[Any, Any]:
    """What each of the two says: format, faults as (line, path), features."""
    check = DatasetCheck(LIMITS)
    check.feed(content)
    report = check.finish()
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    reader = RowReader(path, errors_max=1000)
    list(reader)
    here = (report.format, sorted((error.line, error.path) for error in report.errors), asdict(report.features))
    there = (reader.format, sorted((error.line, error.path) for error in reader.errors.kept), asdict(reader.features))
    return here, there


def lines(*documents: Any) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


@pytest.mark.parametrize(("document", "kind", "used"), GOOD)
def test_both_take_a_good_file(tmp_path: Path, document: Any, kind: str, used: set[str]) -> None:
    here, there = both(tmp_path, lines(document))
    assert here == there
    assert here[:2] == (kind, [])
    assert {name for name, on in here[2].items() if on} == used


@pytest.mark.parametrize(("document", "paths"), BAD)
def test_both_refuse_a_bad_file_at_the_same_places(tmp_path: Path, document: Any, paths: list[str]) -> None:
    here, there = both(tmp_path, lines(document))
    assert here[1] == there[1] == [(1, path) for path in sorted(paths)]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines(PAIR),
        lines(PAIR) + b"\xff\n",
        lines(PAIR) + b"{oops}\n",
        lines(PAIR) + b'{"prompt": NaN, "completion": "x"}',
        b'{"text": "said", "text": "dropped"}',
        b'{"messages": [{"role": "system", "role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
        b'{"text": "t", "note": {"\\ud800": 1, "\\ud800": 2}}',
        b'{"text": "t", "weight": 1e999}',
        b'{"text": "t", "note": [-1e999]}',
        lines(PAIR, talk(USER, ANSWER), PAIR, {"text": "x"}),
        lines({"prompt": "p"}, talk(USER, ANSWER), PAIR),
        b"\n \n\t\n" + lines(PAIR)[:-1] + b"\n1",
        b"[" * 100_000,
    ],
)
def test_both_see_the_same_lines(tmp_path: Path, content: bytes) -> None:
    here, there = both(tmp_path, content)
    assert here[1] == there[1] != []


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
def test_both_agree_on_anything(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    here, there = both(tmp_path_factory.getbasetemp(), lines(*rows))
    if not rows:
        # Each says it in its own words: line 0 is the whole file there, line 1 here.
        assert here[1]
        assert there[1]
        return
    assert here[1] == there[1]
    if not here[1]:
        assert here == there


TABLES: list[tuple[dict[str, Any], bool]] = [
    ({"input_ids": [[1, 2], [3]]}, True),
    ({"input_ids": [[0, 1, 2]], "attention_mask": [[0, 1, 1]], "labels": [[-100, -100, 2]]}, True),
    ({"input_ids": pa.array([[1], [2, 3]], pa.large_list(pa.uint16()))}, True),
    ({"ids": [[1]]}, False),
    ({"input_ids": [[1]], "position_ids": [[0]]}, False),
    ({"input_ids": [["a"]]}, False),
    ({"input_ids": [[1.5]]}, False),
    ({"input_ids": pa.array([], pa.list_(pa.int32()))}, False),
    ({"input_ids": [[1], None, [2, None], [], [-1], [2**31]]}, False),
    ({"input_ids": [[1, 2]], "labels": [[1]]}, False),
    ({"input_ids": [[1, 2]] * 3, "labels": [[1, 3], [-1, 2], None]}, False),
    ({"input_ids": [[1, 2, 3]] * 4, "attention_mask": [[1, 0, 1], [0, 0, 0], [1, 1, 2], [1, 1]]}, False),
    ({"input_ids": [[1, 2]], "attention_mask": [[1, 0]], "labels": [[1, 2]]}, False),
]


def both_of_tokens(path: Path) -> tuple[Any, Any]:
    errors = FoundErrors(kept_max=1000)
    with path.open("rb") as stream:
        check_tokens(stream, ROWS_MAX, errors)
    reader = RowReader(path, errors_max=1000)
    list(reader)
    here = sorted((error.line, error.path) for error in errors.kept)
    return here, sorted((error.line, error.path) for error in reader.errors.kept)


@pytest.mark.parametrize(("columns", "is_good"), TABLES)
def test_both_judge_token_files_alike(tmp_path: Path, columns: dict[str, Any], is_good: bool) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2)
    here, there = both_of_tokens(path)
    assert here == there
    assert (not here) == is_good


def test_an_uploaded_token_file_is_checked_by_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"input_ids": [[1, 2], [-1]]}), path)
    check = ContentCheck(LIMITS, ParquetLimits(check_s_max=60, memory_bytes_max=4 << 30, spool_dir=tmp_path))
    for piece in (path.read_bytes()[:3], path.read_bytes()[3:]):
        check.feed(piece)
    report = check.finish()
    check.close()
    assert (report.format, report.line_count, report.error_count) == ("tokens", 2, 1)
    assert (report.errors[0].line, report.errors[0].path) == (2, "$.input_ids[0]")
    # Nothing is left where the bytes waited.
    assert [left.name for left in tmp_path.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1 and text PAR1", b"PAR1" + bytes(200)])
def test_both_refuse_a_torn_token_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    here, there = both_of_tokens(path)
    assert here == there == [(0, "$")]


def test_a_parquet_check_out_of_bounds_is_an_error_of_the_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1] * 5_000_000]}), tmp_path / "t.parquet")
    for limits in (
        ParquetLimits(check_s_max=0.01, memory_bytes_max=4 << 30, spool_dir=None),
        ParquetLimits(check_s_max=60, memory_bytes_max=64 << 20, spool_dir=None),
    ):
        check = ContentCheck(LIMITS, limits)
        check.feed((tmp_path / "t.parquet").read_bytes())
        report = check.finish()
        check.close()
        assert (report.error_count, report.errors[0].line) == (1, 0)


@pytest.mark.parametrize("content", [b"", b"{", b"PAR", b'{"text": "x"}'])
def test_short_content_is_checked_as_lines(content: bytes) -> None:
    lines_alone = DatasetCheck(LIMITS)
    lines_alone.feed(content)
    check = ContentCheck(LIMITS, ParquetLimits(check_s_max=1, memory_bytes_max=1, spool_dir=None))
    for byte in content:
        check.feed(bytes([byte]))
    assert check.finish() == lines_alone.finish()
