"""Reads a dataset file row by row, in bounded memory, with an error for every broken line. It knows no tokenizer."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from formats.foreign_files import HEAD_BYTES, foreign_file
from formats.line_parser import LineParser
from formats.row_errors import ERRORS_MAX, RowErrors
from formats.row_formats import check_file
from formats.rows import PARQUET_MAGIC, ROWS_MAX, Format, Row

LINE_BYTES_MAX = 16 * 1024 * 1024


class LineReader:
    """Iterates over (number, line) of the lines that hold something. `sha256` of the whole file is there at the end;
    of a file that is no JSONL there is one error and nothing else."""

    def __init__(self, path: Path, errors: RowErrors) -> None:
        self.sha256 = ""
        self.bytes_read = 0
        self.errors = errors
        self._path = path

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        digest = hashlib.sha256()
        lines = rows = 0
        with self._path.open("rb") as stream:
            foreign = foreign_file(stream.read(HEAD_BYTES))
            if foreign is not None:
                self.errors.add(0, "$", foreign.expectation, foreign.found)
                return
            stream.seek(0)
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
    """Iterates over the sound rows of a file.

    `errors`, `format`, `features` and `sha256` are complete once the iteration is.
    """

    def __init__(self, path: Path, errors_max: int = ERRORS_MAX) -> None:
        self.format: Format | None = None
        self.sha256 = ""
        self._path = path
        self._parser = LineParser(errors_max)
        self.errors = self._parser.errors
        self.features = self._parser.features

    def __iter__(self) -> Iterator[Row]:
        yield from self._token_rows() if is_parquet(self._path) else self._lines()

    def _token_rows(self) -> Iterator[Row]:
        # Arrow takes a moment to load that most files need not pay.
        from formats.parquet import TokenRows  # noqa: PLC0415

        with self._path.open("rb") as stream:
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        for row in TokenRows(self._path, self.errors):
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
        check_file(self.format, self.features, self.errors)


def is_parquet(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
