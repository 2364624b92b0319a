"""Checks a JSONL dataset from chunks of bytes and reports every error with its line, JSON path and expectation.

Bounded: it holds one line at a time and never the file. It knows no tokenizer, no store and no protobuf.
"""

from dataclasses import dataclass

from formats.line_parser import LineParser
from formats.row_errors import RowError
from formats.row_formats import check_file
from formats.rows import Features, Format

_WHOLE = "$"


@dataclass(frozen=True, kw_only=True)
class DatasetLimits:
    """What one file may hold; errors past `errors_max` are counted but not kept."""

    line_bytes_max: int
    lines_max: int
    messages_max: int
    errors_max: int


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What is known of a file after its check. `line_count` is how many examples it has: lines that are not blank."""

    format: Format | None
    line_count: int
    errors: tuple[RowError, ...]
    error_count: int
    features: Features


class LineCheck:
    """`feed` the chunks in order, then `finish` once."""

    def __init__(self, limits: DatasetLimits) -> None:
        self._limits = limits
        self._parser = LineParser(limits.errors_max, messages_max=limits.messages_max)
        self._partial = bytearray()
        self._skipping = False
        self._line = 0
        self._examples = 0

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
        errors = self._parser.errors
        if not self._examples:
            errors.add(0, _WHOLE, "at least one example, one JSON object on a line", "an empty file")
        check_file(self._parser.expected, self._parser.features, errors)
        return DatasetReport(
            format=self._parser.expected,
            line_count=self._examples,
            errors=tuple(errors.kept),
            error_count=errors.count,
            features=self._parser.features,
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
                self._refuse(f"at most {self._limits.lines_max} examples in a file", "one more")
        elif len(line) > self._limits.line_bytes_max:
            limit = self._limits.line_bytes_max
            self._refuse(f"a line of at most {limit} bytes", f"more than {limit} bytes")
        else:
            self._parser.row(self._line, line)

    def _refuse(self, expectation: str, found: str) -> None:
        self._parser.errors.add(self._line, _WHOLE, expectation, found)
