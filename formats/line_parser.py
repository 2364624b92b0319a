"""Parses the lines of a JSONL dataset: bytes to typed rows of one format, with every error. It reads no file."""

import json
from typing import Any

from formats.descriptions import describe
from formats.fields import said
from formats.row_errors import ERRORS_MAX, LineFaults, RowErrors
from formats.row_formats import format_of, note_features, read_row
from formats.rows import MESSAGES_MAX, Features, Format, Row
from formats.strict_json import strict_json

BOM = b"\xef\xbb\xbf"
_WITHOUT_BOM = (
    "UTF-8 without a byte order mark: save the file so, in Python with the encoding utf-8 instead of utf-8-sig, or run "
    "tail -c +4 FILE > rows.jsonl"
)
_FOUND_CHARS_MAX = 80


class LineParser:
    """Gives rows of one format: that of the first line that has one, or the one `expected`. Keeps no line."""

    def __init__(
        self, errors_max: int = ERRORS_MAX, expected: Format | None = None, messages_max: int = MESSAGES_MAX
    ) -> None:
        self.errors = RowErrors(kept_max=errors_max)
        self.features = Features()
        # The format of the first recognised row, sound or not.
        self.expected = expected
        self._messages_max = messages_max
        # Foreign formats that were found, each told once.
        self._told: set[str] = set()

    def row(self, number: int, line: bytes) -> Row | None:
        """None for a line with an error, also for one that was told before. Lines count from 1."""
        faults = LineFaults(number, self.errors)
        document = _document(line, first=number == 1, faults=faults)
        kind = None if document is None else format_of(document, faults, self._told)
        if document is None or kind is None:
            return None
        row = read_row(number, document, kind, faults, self._messages_max)
        self.expected = self.expected or kind
        if kind != self.expected:
            faults.add("$", f"a row of the {self.expected} format like the rows before it", f"{kind} format")
        if row is None or faults.count:
            return None
        note_features(row, self.features)
        return row


def _document(line: bytes, *, first: bool, faults: LineFaults) -> dict[str, Any] | None:
    if first and line.startswith(BOM):
        faults.add("$", _WITHOUT_BOM, "a byte order mark")
        line = line[len(BOM) :]
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at offset {error.start} of the line"
        faults.add("$", "UTF-8 text", found)
        return None
    try:
        document = strict_json(text)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at character {error.pos + 1}"
    except RecursionError:
        found = "brackets nested too deeply"
    except ValueError as error:
        found = str(error)[:_FOUND_CHARS_MAX]
    else:
        if isinstance(document, dict):
            return said(document)
        found = describe(document)
    faults.add("$", "a JSON object", found)
    return None
