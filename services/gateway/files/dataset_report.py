"""What one file may hold, and what is known of it after its check, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formats.row_errors import RowError
from formats.rows import Features, Format
from formats.work import Work, WorkLimits


@dataclass(frozen=True, kw_only=True)
class DatasetLimits:
    """What one file may hold; errors past `errors_max` are counted but not kept."""

    line_bytes_max: int
    lines_max: int
    messages_max: int
    errors_max: int
    cells_max: int
    expanded_bytes_max: int

    def work(self) -> WorkLimits:
        return WorkLimits(rows_max=self.lines_max, cells_max=self.cells_max, expanded_bytes_max=self.expanded_bytes_max)


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What is known of a file after its check. `line_count` is how many examples it has: lines that are not blank."""

    format: Format | None
    line_count: int
    errors: tuple[RowError, ...]
    error_count: int
    features: Features
    work: Work


def report_of(document: Mapping[str, Any]) -> DatasetReport:
    """From the answer of the program that checked."""
    return DatasetReport(
        format=document["format"],
        line_count=document["line_count"],
        errors=tuple(RowError(**error) for error in document["errors"]),
        error_count=document["error_count"],
        features=Features(**document["features"]),
        work=Work(**document["work"]),
    )
