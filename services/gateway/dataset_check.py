"""Checks a JSONL dataset from chunks of bytes and reports every error with its line, JSON path and expectation.

Pure and bounded: it holds one line at a time and never the file. It knows no tokenizer, no store and no protobuf.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from services.gateway.dataset_rows import Features, Format, check_row, describe, strict_json

_FOUND_CHARS_MAX = 80
_BOM = b"\xef\xbb\xbf"
_WHOLE = "$"


@dataclass(frozen=True, kw_only=True)
class DatasetLimits:
    """What one file may hold; errors past `errors_max` are counted but not kept."""

    line_bytes_max: int
    lines_max: int
    messages_max: int
    errors_max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetError:
    """`line` counts from 1; 0 is the file as a whole."""

    line: int
    path: str
    expectation: str
    found: str


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    format: Format | None
    # Non-blank lines, which are the examples.
    line_count: int
    errors: tuple[DatasetError, ...]
    error_count: int
    features: Features


class DatasetCheck:
    """`feed` the chunks in order, then `finish` once."""

    def __init__(self, limits: DatasetLimits) -> None:
        self._limits = limits
        self._errors = FoundErrors(kept_max=limits.errors_max)
        self._partial = bytearray()
        self._skipping = False
        self._line = 0
        self._features = Features()
        self._examples = 0
        # The format of the first sound line; of the first recognised one as long as none is sound.
        self._format: Format | None = None
        self._seen: Format | None = None

    def feed(self, chunk: bytes) -> None:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            if self._skipping:
                self._skipping = False
            elif self._partial:
                self._add(chunk[start:end])
                self._end_partial()
            else:
                self._check(chunk[start:end])
            start = end + 1
        if start < len(chunk) and not self._skipping:
            self._add(chunk[start:])

    def finish(self) -> DatasetReport:
        if self._partial:
            self._end_partial()
        if not self._examples:
            self._errors.add(0, _WHOLE, "at least one example, one JSON object on a line", "an empty file")
        return DatasetReport(
            format=self._format or self._seen,
            line_count=self._examples,
            errors=tuple(self._errors.kept),
            error_count=self._errors.count,
            features=self._features,
        )

    def _add(self, piece: bytes) -> None:
        self._partial += piece
        if len(self._partial) > self._limits.line_bytes_max:
            self._check(bytes(self._partial[: self._limits.line_bytes_max + 1]))
            self._partial.clear()
            self._skipping = True

    def _end_partial(self) -> None:
        if self._skipping:
            # The piece that ended the line also took it over the limit: it is checked and reported already.
            self._skipping = False
            return
        line = bytes(self._partial)
        self._partial.clear()
        self._check(line)

    def _check(self, line: bytes) -> None:
        self._line += 1
        if not line.strip():
            return
        self._examples += 1
        if self._examples > self._limits.lines_max:
            if self._examples == self._limits.lines_max + 1:
                self._errors.add(self._line, _WHOLE, f"at most {self._limits.lines_max} examples in a file", "one more")
            return
        errors_before = self._errors.count
        document = self._parse(line)
        if document is None:
            return
        shape = check_row(document, self._limits.messages_max, self._features, self._refuse)
        if shape is None:
            return
        self._seen = self._seen or shape
        expected = self._format or self._seen
        if shape != expected:
            self._refuse(_WHOLE, f"an example of the {expected} format, like the lines before it", f"{shape} format")
        elif self._format is None and self._errors.count == errors_before:
            self._format = shape

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        if len(line) > self._limits.line_bytes_max:
            limit = self._limits.line_bytes_max
            self._refuse(_WHOLE, f"a line of at most {limit} bytes", f"more than {limit} bytes")
            return None
        if line.startswith(_BOM) and self._line == 1:
            self._refuse(_WHOLE, "UTF-8 without a byte order mark", "a byte order mark")
            line = line[len(_BOM) :]
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at offset {error.start} of the line"
            self._refuse(_WHOLE, "UTF-8 text", found)
            return None
        try:
            document = strict_json(text)
        except json.JSONDecodeError as error:
            self._refuse(_WHOLE, "a JSON object", f"{error.msg} at character {error.pos + 1}")
            return None
        except RecursionError:
            self._refuse(_WHOLE, "a JSON object", "brackets nested too deeply")
            return None
        except ValueError as error:
            self._refuse(_WHOLE, "a JSON object", str(error)[:_FOUND_CHARS_MAX])
            return None
        if not isinstance(document, dict):
            self._refuse(_WHOLE, "a JSON object", describe(document))
            return None
        return document

    def _refuse(self, path: str, expectation: str, found: str) -> None:
        self._errors.add(self._line, path, expectation, found)


@dataclass(kw_only=True)
class FoundErrors:
    """Keeps the first ones and counts all."""

    kept_max: int
    kept: list[DatasetError] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, path: str, expectation: str, found: str) -> None:
        self.count += 1
        if len(self.kept) < self.kept_max:
            self.kept.append(DatasetError(line=line, path=path, expectation=expectation, found=found))
