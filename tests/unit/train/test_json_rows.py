"""Every broken line is reported with its number, path and what was expected."""

from pathlib import Path

import pytest

from formats.rows import Conversation, Instruction, Message, Preference, Text, ToolCall
from services.trainer.train.data.tokens.row_reader import RowReader

GOOD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


def read(tmp_path: Path, content: bytes, errors_max: int = 100) -> tuple[list[object], RowReader]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    reader = RowReader(path, errors_max)
    return list(reader), reader


def test_conversations_are_read_with_weights_and_blank_lines_skipped(tmp_path: Path) -> None:
    content = (
        b'\n{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, '
        b'{"role": "assistant", "content": "a", "weight": 0}], "id": 7}\n  \n' + GOOD
    )
    rows, reader = read(tmp_path, content)
    assert rows[0] == Conversation(
        line=2,
        messages=(
            Message(role="system", content="s"),
            Message(role="user", content="u"),
            Message(role="assistant", content="a", weight=0),
        ),
    )
    assert (len(rows), reader.format, reader.errors.count) == (2, "conversation", 0)


def test_instructions_are_read(tmp_path: Path) -> None:
    rows, reader = read(tmp_path, b'{"prompt": "p", "completion": "c"}')
    assert rows == [Instruction(line=1, prompt="p", completion="c")]
    assert reader.format == "instruction"


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"{", "$"),
        (b"[1]", "$"),
        (b"\xff\xfe", "$"),
        (b"{}", "$"),
        (b'{"messages": []}', "$.messages"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "$.messages"),
        (b'{"messages": ["x", {"role": "assistant", "content": "x"}]}', "$.messages[0]"),
        (
            b'{"messages": [{"role": "bot", "content": "x"}, {"role": "assistant", "content": "x"}]}',
            "$.messages[0].role",
        ),
        (b'{"messages": [{"role": "assistant", "content": 3}]}', "$.messages[0].content"),
        (b'{"messages": [{"role": "assistant", "content": "x", "weight": 2}]}', "$.messages[0].weight"),
        (b'{"messages": [{"role": "assistant", "content": "x", "weight": true}]}', "$.messages[0].weight"),
        (b'{"messages": [{"role": "assistant", "content": "x", "wieght": 1}]}', "$.messages[0].wieght"),
        (b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "$.messages[0].content"),
        (
            b'{"messages": [{"role": "assistant", "content": "x"}, {"role": "human", "content": "x"}]}',
            "$.messages[1].role",
        ),
        (b'{"messages": [{"role": "assistant", "content": "x"}], "tools": {}}', "$.tools"),
        (b'{"messages": [{"role": "assistant", "content": "x"}], "functions": []}', "$.functions"),
        (b'{"messages": [{"role": "assistant", "content": "x"}], "weight": -1}', "$.weight"),
        (b'{"messages": [{"role": "assistant", "content": "x"}], "text": "x"}', "$"),
        (b'{"prompt": "p", "completion": "c"}', "$"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, path: str) -> None:
    rows, reader = read(tmp_path, GOOD + line + b"\n" + GOOD)
    assert len(rows) == 2
    assert [(error.line, error.path) for error in reader.errors.kept] == [(2, path)]


@pytest.mark.parametrize(
    "line", [b'{"prompt": "p"}', b'{"prompt": "p", "completion": ""}', b'{"prompt": 1, "completion": "x"}']
)
def test_a_broken_instruction_is_named(tmp_path: Path, line: bytes) -> None:
    _, reader = read(tmp_path, b'{"prompt": "p", "completion": "c"}\n' + line)
    assert [error.line for error in reader.errors.kept] == [2]
    assert reader.errors.kept[0].path in ("$.completion", "$.prompt")


def test_texts_and_preferences_are_read(tmp_path: Path) -> None:
    rows, reader = read(tmp_path, b'{"text": "t", "weight": 0.5}\n')
    assert (rows, reader.format) == ([Text(line=1, text="t", weight=0.5)], "text")
    content = (
        b'{"input": {"messages": [{"role": "user", "content": "q"}]}, '
        b'"preferred_output": [{"role": "assistant", "content": "good"}], '
        b'"non_preferred_output": [{"role": "assistant", "content": "bad"}]}'
    )
    rows, reader = read(tmp_path, content)
    assert reader.format == "preference"
    assert rows == [
        Preference(
            line=1,
            messages=(Message(role="user", content="q"),),
            preferred_output=(Message(role="assistant", content="good"),),
            non_preferred_output=(Message(role="assistant", content="bad"),),
        )
    ]


def test_tools_and_reasoning_are_read(tmp_path: Path) -> None:
    content = (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null, "reasoning": "hm", '
        b'"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]}, '
        b'{"role": "tool", "tool_call_id": "1", "content": "7"}, {"role": "assistant", "content": "7"}], '
        b'"tools": [{"type": "function", "function": {"name": "f"}}]}'
    )
    rows, reader = read(tmp_path, content)
    assert reader.errors.kept == []
    (row,) = rows
    assert isinstance(row, Conversation)
    assert row.tools == ({"type": "function", "function": {"name": "f"}},)
    call = ToolCall(id="1", name="f", arguments={"a": 1})
    assert row.messages[1] == Message(role="assistant", content="", reasoning="hm", tool_calls=(call,))
    assert row.messages[2] == Message(role="tool", content="7", tool_call_id="1")


def test_errors_are_capped_but_all_counted(tmp_path: Path) -> None:
    _, reader = read(tmp_path, b"{x}\n" * 50, errors_max=3)
    assert ([error.line for error in reader.errors.kept], reader.errors.count) == ([1, 2, 3], 50)


def test_a_file_that_is_no_jsonl_is_one_error(tmp_path: Path) -> None:
    rows, reader = read(tmp_path, b"[\n" + GOOD + b"]\n")
    (error,) = reader.errors.kept
    assert (rows, reader.errors.count, error.line, error.found) == ([], 1, 0, "a JSON array")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    _, reader = read(tmp_path, b"\n \n")
    assert [error.expectation for error in reader.errors.kept] == ["at least one row; the file is empty"]
