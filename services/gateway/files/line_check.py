"""Checks a JSONL dataset from chunks of bytes and reports every error with its line, JSON path and expectation.

Bounded: it holds one line at a time and never the file. It knows no tokenizer, no store and no protobuf.
"""

from collections.abc import Callable
from typing import Protocol

from formats.foreign_files import HEAD_BYTES, foreign_file
from formats.line_parser import LineParser
from formats.row_formats import check_file
from formats.rows import Format
from formats.work import TooMuchWork, Work
from services.gateway.files.dataset_report import DatasetLimits, DatasetReport

_WHOLE = "$"
# Lines are seen in groups of about these sizes, from the first to the last, before they are read one by one.
_GROUP_BYTES = (64 * 1024, 8 * 1024)


class SoundLines(Protocol):
    """Sees many lines at once; plain_lines.py has them."""

    def rows_of(self, lines: bytes) -> int:
        """How many rows whole lines are, 0 when they have to be read one by one."""
        ...


class LineCheck:
    """`feed` the chunks in order, then `finish` once. `feed` raises TooMuchWork for a row too many.

    `see` makes what sees many lines at once, of a format and with a limit of messages.
    """

    def __init__(self, limits: DatasetLimits, see: Callable[[Format, int], SoundLines] | None = None) -> None:
        self._limits = limits
        self._see = see
        self._parser = LineParser(limits.errors_max, messages_max=limits.messages_max)
        # The first bytes, until they say what the file is.
        self._head: bytearray | None = bytearray()
        self._is_foreign = False
        self._partial = bytearray()
        self._skipping = False
        self._line = 0
        self._examples = 0
        self._bytes = 0
        self._plain: SoundLines | None = None

    def feed(self, chunk: bytes) -> None:
        self._bytes += len(chunk)
        if self._head is not None:
            self._head += chunk
            if len(self._head) < HEAD_BYTES:
                return
            chunk = self._judged()
        if not self._is_foreign:
            self._take(chunk)

    def _judged(self) -> bytes:
        """All bytes that came until now, of which nothing was taken; a foreign file is one error."""
        assert self._head is not None
        head, self._head = bytes(self._head), None
        foreign = foreign_file(head[:HEAD_BYTES])
        if foreign is not None:
            self._is_foreign = True
            self._parser.errors.add(0, _WHOLE, foreign.expectation, foreign.found)
        return head

    def _take(self, chunk: bytes) -> None:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            if self._skipping:
                self._skipping = False
            elif self._partial:
                self._add(chunk[start:end])
                self._end_partial()
            else:
                whole = chunk.rfind(b"\n") + 1
                self._check_whole(chunk[start:whole])
                start = whole
                break
            start = end + 1
        if start < len(chunk) and not self._skipping:
            self._add(chunk[start:])

    def finish(self) -> DatasetReport:
        if self._head is not None:
            head = self._judged()
            if not self._is_foreign:
                self._take(head)
        if self._partial:
            self._end_partial()
        errors = self._parser.errors
        if not self._examples and not self._is_foreign:
            errors.add(0, _WHOLE, "at least one example, one JSON object on a line", "an empty file")
        check_file(self._parser.expected, self._parser.features, errors)
        return DatasetReport(
            format=self._parser.expected,
            line_count=self._examples,
            errors=tuple(errors.kept),
            error_count=errors.count,
            features=self._parser.features,
            work=Work(rows=self._examples, expanded_bytes=self._bytes),
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

    def _check_whole(self, lines: bytes, group_bytes: tuple[int, ...] = _GROUP_BYTES) -> None:
        """Lines that end here. Groups of plain lines are seen at once, and others in smaller groups, or one by one."""
        start = 0
        while start < len(lines):
            if self._plain is None or not group_bytes:
                end = lines.find(b"\n", start)
                self._check(lines[start:end])
                start = end + 1
                continue
            end = (lines.find(b"\n", start + group_bytes[0]) + 1) or len(lines)
            group = lines[start:end]
            rows = self._plain.rows_of(group) if len(group) <= self._limits.line_bytes_max else 0
            if rows and self._examples + rows <= self._limits.lines_max:
                self._line += rows
                self._examples += rows
            else:
                self._check_whole(group, group_bytes[1:])
            start = end

    def _check(self, line: bytes) -> None:
        self._line += 1
        if not line or line.isspace():
            return
        self._examples += 1
        limit = self._limits.line_bytes_max
        if self._examples > self._limits.lines_max:
            raise TooMuchWork("rows", self._examples, self._limits.lines_max)
        if len(line) > limit:
            expectation = f"a line of at most {limit} bytes"
            self._parser.errors.add(self._line, _WHOLE, expectation, f"more than {limit} bytes")
        else:
            self._parser.row(self._line, line)
            if self._plain is None and self._see is not None and self._parser.expected is not None:
                # The first row says what the others look like.
                self._plain = self._see(self._parser.expected, self._limits.messages_max)
