"""Says from its first bytes what a file is that is no JSONL, and how to make JSONL of it. It reads no file."""

import codecs
import json
from dataclasses import dataclass
from typing import Any

from formats.descriptions import describe
from formats.line_parser import BOM
from formats.strict_json import strict_json

# So many bytes tell what a file is.
HEAD_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """`expectation` names the cure, `found` what the file is."""

    expectation: str
    found: str


_TO = "> rows.jsonl"
_ICONV = "iconv -t UTF-8 -f"
_ARROW = "python -c \"from datasets import Dataset; Dataset.from_file('FILE').to_json('rows.jsonl')\""
# The first bytes of kinds of files, what such a file is, and what makes JSONL of it.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a file compressed by gzip", f"gunzip -c FILE {_TO}"),
    (b"PK\x03\x04", "a ZIP archive, or a spreadsheet or document that is one", f"unzip -p FILE {_TO}"),
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd", f"zstd -dc FILE {_TO}"),
    (b"BZh", "a file compressed by bzip2", f"bunzip2 -c FILE {_TO}"),
    (b"\xfd7zXZ\x00", "a file compressed by xz", f"xz -dc FILE {_TO}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"7z x -so FILE {_TO}"),
    (b"\xff\xfe\x00\x00", "text in UTF-32", f"{_ICONV} UTF-32 FILE {_TO}"),
    (b"\x00\x00\xfe\xff", "text in UTF-32", f"{_ICONV} UTF-32 FILE {_TO}"),
    (b"\xff\xfe", "text in UTF-16", f"{_ICONV} UTF-16 FILE {_TO}"),
    (b"\xfe\xff", "text in UTF-16", f"{_ICONV} UTF-16 FILE {_TO}"),
    (b"{\x00\x00\x00", "text in UTF-32", f"{_ICONV} UTF-32LE FILE {_TO}"),
    (b"\x00\x00\x00{", "text in UTF-32", f"{_ICONV} UTF-32BE FILE {_TO}"),
    (b"{\x00", "text in UTF-16", f"{_ICONV} UTF-16LE FILE {_TO}"),
    (b"\x00{", "text in UTF-16", f"{_ICONV} UTF-16BE FILE {_TO}"),
    (b"ARROW1", "an Arrow file", _ARROW),
    (b"\xff\xff\xff\xff", "an Arrow file", _ARROW),
    (b"SQLite format 3\x00", "an SQLite database", "sqlite3 -json FILE QUERY | jq -c '.[]' > rows.jsonl"),
    (b"%PDF", "a PDF document", 'extract its text, and write it as rows of {"text": ...}'),
    (b"version https://git-lfs", "a pointer of Git LFS instead of the file that it stands for", "git lfs pull"),
)
_TAR_AT, _TAR = 257, b"ustar"
_MARKUP = (b"<!doctype", b"<html", b"<?xml")
# What an object over several lines has at the end of its first one.
_GOES_ON = (b"{", b"[", b",", b":")
_SEPARATORS = {",": "CSV", ";": "CSV with semicolons", "\t": "tab-separated values"}
_COLUMNS = frozenset(
    {
        "messages", "prompt", "completion", "text", "label", "input", "output", "instruction", "response", "question",
        "answer", "query", "chosen", "rejected", "user", "assistant", "system", "role", "content",
    }
)  # fmt: skip


def foreign_file(head: bytes) -> ForeignFile | None:
    """None for what may be JSONL. `head` is the first HEAD_BYTES of the file, or all of a shorter one."""
    for magic, what, cure in _MAGIC:
        if head.startswith(magic):
            return _foreign(what, cure)
    if head[_TAR_AT:].startswith(_TAR):
        return _foreign("a tar archive", "tar -xf FILE, and take the file of rows in it")
    start = head.removeprefix(BOM).lstrip()
    if start.lower().startswith(_MARKUP):
        return _foreign("a web page or XML", "download the file itself instead of the page that shows it")
    if start.startswith(b"["):
        return _foreign("a JSON array", f"jq -c '.[]' FILE {_TO}")
    first, end, _ = start.partition(b"\n")
    if first.startswith(b"{"):
        return _foreign_object(first.rstrip()) if end else None
    if not start or any(line.lstrip().startswith(b"{") for line in start.split(b"\n")):
        return None
    return _no_json(first.rstrip(), is_whole=bool(end) or len(head) < HEAD_BYTES)


def _foreign_object(first: bytes) -> ForeignFile | None:
    """Of a file whose first line, which is whole, begins an object."""
    if first.startswith(b"{'"):
        cure = "write them with json.dumps(row) instead of str(row)"
        return _foreign("dictionaries as Python prints them", cure)
    if not first.endswith(_GOES_ON) or _parsed(first) is not None:
        return None
    if _parsed(first.removesuffix(b",")) is not None:
        return _foreign("objects with commas between them", f"sed 's/,[[:space:]]*$//' FILE {_TO}")
    cure = f"jq -c . FILE {_TO}, where '.KEY[]' instead of . takes the rows from a list in it"
    return _foreign("a JSON document over several lines", cure)


def _parsed(line: bytes) -> Any:
    try:
        return strict_json(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _no_json(first: bytes, *, is_whole: bool) -> ForeignFile:
    try:
        # The last character of a line that goes on may be cut in two.
        text = codecs.getincrementaldecoder("utf-8")().decode(first, final=is_whole)
    except UnicodeDecodeError:
        return _foreign("no text in UTF-8", f"where it is text, {_ICONV} ITS-ENCODING FILE {_TO}")
    for separator, name in _SEPARATORS.items():
        columns = {cell.strip().strip('"').lower() for cell in text.split(separator)}
        if len(columns) > 1 and columns & _COLUMNS:
            delimiter = "" if separator == "," else f", delimiter={json.dumps(separator)}"
            cure = (
                f"in Python, for row in csv.DictReader(open(FILE, newline=''){delimiter}): print(json.dumps(ROW)), "
                "where ROW is row with the keys of a format, such as prompt and completion"
            )
            return _foreign(f"{name} with the columns {describe(text)}", cure)
    cure = 'plain text is trained as rows of {"text": ...}, one for each document'
    return _foreign(f"text in which no line begins an object; the first one is {describe(text)}", cure)


def _foreign(what: str, cure: str) -> ForeignFile:
    return ForeignFile(expectation=f"JSON objects in UTF-8, one on a line: {cure}", found=what)
