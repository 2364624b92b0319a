"""Reads a dataset file row by row, in bounded memory, and reports every broken line.

It knows no tokenizer and no template.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.trainer.train.data.rows.json_rows import format_of, note_features, read_row
from services.trainer.train.data.rows.messages import Refuse, strict_json
from services.trainer.train.data.rows.row_types import (
    ERRORS_MAX,
    LINE_BYTES_MAX,
    ROWS_MAX,
    Features,
    Format,
    Row,
    RowErrors,
)

PARQUET_MAGIC = b"PAR1"
_BOM = b"\xef\xbb\xbf"


class RowParser:
    """Turns lines into rows of one format: that of the first line that has one, or the one `expected`. Keeps no
    line."""

    def __init__(self, errors_max: int = ERRORS_MAX, expected: Format | None = None) -> None:
        self.errors = RowErrors(kept_max=errors_max)
        self.features = Features()
        # What the first recognised row is, sound or not.
        self.expected = expected

    def row(self, number: int, line: bytes) -> Row | None:
        """None for a line with an error."""
        errors_before = self.errors.count

        def refuse(path: str, expected: str) -> None:
            self.errors.add(number, path, expected)

        document = _parse(line, first=number == 1, refuse=refuse)
        kind = None if document is None else format_of(document, refuse)
        if document is None or kind is None:
            return None
        row = read_row(number, document, kind, refuse)
        self.expected = self.expected or kind
        if kind != self.expected:
            refuse("$", f"a row of the {self.expected} format like the rows before it")
        if row is None or self.errors.count > errors_before:
            return None
        note_features(row, self.features)
        return row


class LineReader:
    """Iterates over (number, line) of the lines that hold something. `sha256` of the whole file is there at the end."""

    def __init__(self, path: Path, errors: RowErrors) -> None:
        self.sha256 = ""
        self.bytes_read = 0
        self.errors = errors
        self._path = path

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        digest = hashlib.sha256()
        lines = rows = 0
        with self._path.open("rb") as stream:
            while line := stream.readline(LINE_BYTES_MAX + 1):
                digest.update(line)
                self.bytes_read += len(line)
                lines += 1
                if len(line.rstrip(b"\n")) > LINE_BYTES_MAX:
                    self.errors.add(lines, "$", f"a line of at most {LINE_BYTES_MAX} bytes")
                    break
                if not line.strip():
                    continue
                rows += 1
                if rows > ROWS_MAX:
                    self.errors.add(lines, "$", f"at most {ROWS_MAX} rows")
                    break
                yield lines, line
        self.sha256 = digest.hexdigest()


class RowReader:
    """Iterates over the sound rows of a file. `errors`, `format`, `features` and `sha256` are complete once the
    iteration is."""

    def __init__(self, path: Path, errors_max: int = ERRORS_MAX) -> None:
        self.format: Format | None = None
        self.sha256 = ""
        self._path = path
        self._parser = RowParser(errors_max)
        self.errors = self._parser.errors
        self.features = self._parser.features

    def __iter__(self) -> Iterator[Row]:
        yield from self._token_rows() if is_parquet(self._path) else self._lines()

    def _token_rows(self) -> Iterator[Row]:
        # Arrow takes a moment to load that most files need not pay.
        from services.trainer.train.data.rows.parquet import read_token_rows  # noqa: PLC0415

        with self._path.open("rb") as stream:
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        for row in read_token_rows(self._path, self.errors):
            self.format = "tokens"
            yield row

    def _lines(self) -> Iterator[Row]:
        lines = LineReader(self._path, self.errors)
        for number, line in lines:
            row = self._parser.row(number, line)
            if row is not None:
                self.format = self._parser.expected
                yield row
        self.sha256 = lines.sha256
        if self.format is None and not self.errors.count:
            add_empty(self.errors)


def is_parquet(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC


def add_empty(errors: RowErrors) -> None:
    errors.add(1, "$", "at least one row; the file is empty")


def _parse(line: bytes, *, first: bool, refuse: Refuse) -> dict[str, Any] | None:
    if first and line.startswith(_BOM):
        refuse("$", "UTF-8 without a byte order mark")
        line = line[len(_BOM) :]
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse("$", f"UTF-8 text; byte {error.start} of the line is not")
        return None
    try:
        document = strict_json(text)
    except (ValueError, RecursionError) as error:
        refuse("$", f"a JSON object: {error}")
        return None
    if not isinstance(document, dict):
        refuse("$", "a JSON object")
        return None
    return document
