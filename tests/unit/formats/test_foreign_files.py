"""Files that are no JSONL are told by what they are, with the way to JSONL; commands that every system has are run."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.foreign_files import HEAD_BYTES, foreign_file

ROWS = [{"prompt": "café", "completion": "😀" * 9}, {"prompt": "b", "completion": "c"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
UTF8 = LINES.encode()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("rows.jsonl", UTF8)
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("rows.jsonl")
        entry.size = len(UTF8)
        archive.addfile(entry, io.BytesIO(UTF8))
    return stream.getvalue()


def arrow(opening: type) -> bytes:
    stream, table = io.BytesIO(), pa.table({"prompt": ["a"]})
    with opening(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


SHELL = [
    (gzip.compress(UTF8), "gzip"),
    (LINES.encode("utf-16"), "UTF-16"),
    (LINES.encode("utf-16-le"), "UTF-16"),
    (LINES.encode("utf-16-be"), "UTF-16"),
    (LINES.encode("utf-32"), "UTF-32"),
    (LINES.encode("utf-32-le"), "UTF-32"),
    (LINES.encode("utf-32-be"), "UTF-32"),
    (UTF8.replace(b"}\n", b"},\n"), "commas"),
]
OTHERS = [
    (zipped(), "ZIP", "unzip"),
    (bz2.compress(UTF8), "bzip2", "bunzip2 -c FILE > rows.jsonl"),
    (lzma.compress(UTF8), "xz", "xz -dc FILE > rows.jsonl"),
    (pa.compress(UTF8, "zstd", asbytes=True), "zstd", "zstd -dc"),
    (b"7z\xbc\xaf\x27\x1c\0\4", "7z", "7z x"),
    (tar(), "tar", "tar -xf"),
    (arrow(pa.ipc.new_file), "Arrow", "to_json"),
    (arrow(pa.ipc.new_stream), "Arrow", "to_json"),
    (b"SQLite format 3\0", "SQLite", "sqlite3"),
    (b"%PDF-1.7\n%", "PDF", "its text"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS", "git lfs pull"),
    (b"\n<!DOCTYPE html>\n<html>", "web page", "download"),
    (b"<?xml version='1.0'?>", "XML", "download"),
    (json.dumps(ROWS).encode(), "JSON array", "jq -c '.[]'"),
    (json.dumps(ROWS, indent=1).encode(), "JSON array", "jq -c '.[]'"),
    (b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode(), "JSON array", "jq -c '.[]'"),
    (json.dumps(ROWS[0], indent=2).encode(), "over several lines", "jq -c ."),
    (b"".join(json.dumps(row, indent=2).encode() + b"\n" for row in ROWS), "over several lines", "jq -c ."),
    (b'{"rows": [\n' + b",\n".join(UTF8.splitlines()) + b"\n]}", "over several lines", ".KEY[]"),
    (b"{'prompt': 'a', 'completion': None}\n", "Python prints", "json.dumps"),
    (b'prompt,completion\na,b\n"c, d",e\n', "CSV with the columns", "csv.DictReader"),
    (b'"Question";"Answer"\n"a";"b"\n', "semicolons", 'delimiter=";"'),
    (b"text\tlabel\na\t1\n", "tab-separated", 'delimiter="\\t"'),
    (b"Once upon a time, there was\nmore", "no line begins an object", '{"text": ...}'),
    (("é" * HEAD_BYTES).encode()[:HEAD_BYTES], "no line begins an object", '{"text": ...}'),
    ("é\n".encode("latin-1"), "no text in UTF-8", "ITS-ENCODING"),
    (b"\x00\x01\x02\xfe", "no text in UTF-8", "ITS-ENCODING"),
]


@pytest.mark.parametrize(("content", "what"), SHELL, ids=range(len(SHELL)))
def test_the_command_that_is_told_makes_the_rows_of_the_file(tmp_path: Path, content: bytes, what: str) -> None:
    found = foreign_file(content[:HEAD_BYTES])
    assert found is not None
    assert what in found.found
    (tmp_path / "FILE").write_bytes(content)
    command = found.expectation.partition("one on a line: ")[2]
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()] == ROWS


@pytest.mark.parametrize(("content", "what", "cure"), OTHERS, ids=range(len(OTHERS)))
def test_what_is_no_jsonl_is_named_with_its_cure(content: bytes, what: str, cure: str) -> None:
    found = foreign_file(content[:HEAD_BYTES])
    assert found is not None
    assert what in found.found
    assert cure in found.expectation


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" \n\n",
        UTF8,
        b"\xef\xbb\xbf" + UTF8,
        b"\n\n" + UTF8,
        b"{oops}\n" + UTF8,
        b"oops\n" + UTF8,
        b'{"text": "' + b"x" * HEAD_BYTES,
        b'{"text": "a,"}\n{"text": ',
        b"{",
        b"{}",
    ],
)
def test_what_may_be_rows_is_left_to_those_who_read_them(content: bytes) -> None:
    assert foreign_file(content[:HEAD_BYTES]) is None


@given(st.binary(max_size=64) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_told_in_words_that_can_be_printed(content: bytes) -> None:
    found = foreign_file(content)
    if found is not None:
        assert found.found.isprintable()
        assert found.expectation.isprintable()
