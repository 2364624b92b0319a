"""Every broken line is reported with its number, path and what was expected."""

from pathlib import Path

import pytest

from services.trainer.train.data import Conversation, Instruction, Message, RowReader

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
    rows, reader = read(tmp_path, b'\xef\xbb\xbf{"prompt": "p", "completion": "c"}')
    assert rows == [Instruction(line=1, prompt="p", completion="c")]
    assert reader.format == "instruction"


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"{", "$"),
        (b"[1]", "$"),
        (b"\xff\xfe", "$"),
        (b"{}", "$.messages"),
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
            b'{"messages": [{"role": "assistant", "content": "x"}, {"role": "system", "content": "x"}]}',
            "$.messages[1].role",
        ),
        (b'{"messages": [{"role": "assistant", "content": "x"}], "tools": []}', "$.tools"),
        (b'{"prompt": "p"}', "$.completion"),
        (b'{"prompt": "p", "completion": ""}', "$.completion"),
        (b'{"prompt": "p", "completion": "c"}', "$"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, path: str) -> None:
    rows, reader = read(tmp_path, GOOD + line + b"\n" + GOOD)
    assert len(rows) == 2
    assert [(error.line, error.path) for error in reader.errors.kept] == [(2, path)]


def test_errors_are_capped_but_all_counted(tmp_path: Path) -> None:
    _, reader = read(tmp_path, b"x\n" * 50, errors_max=3)
    assert ([error.line for error in reader.errors.kept], reader.errors.count) == ([1, 2, 3], 50)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    _, reader = read(tmp_path, b"\n \n")
    assert [error.expected for error in reader.errors.kept] == ["at least one row; the file is empty"]
