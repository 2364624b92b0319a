"""The errors of a dataset: where each is, what was expected there and what was found."""

from dataclasses import dataclass, field

ERRORS_MAX = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class RowError:
    """`line` counts from 1, 0 is the file as a whole; in a Parquet file it is the row. `path` is a JSON path."""

    line: int
    path: str
    expectation: str
    found: str = ""

    @property
    def verdict(self) -> str:
        """What belongs behind the word "expected"."""
        return f"{self.expectation}; found {self.found}" if self.found else self.expectation


@dataclass(kw_only=True)
class RowErrors:
    """Keeps the first `kept_max` errors and counts all."""

    kept_max: int = ERRORS_MAX
    kept: list[RowError] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, path: str, expectation: str, found: str = "") -> None:
        self.count += 1
        if len(self.kept) < self.kept_max:
            self.kept.append(RowError(line=line, path=path, expectation=expectation, found=found))

    def add_all(self, others: "RowErrors") -> None:
        self.count += others.count
        self.kept += others.kept[: max(self.kept_max - len(self.kept), 0)]


class LineFaults:
    """The errors of one line, on their way to those of the file; `count` is how many the line has so far."""

    __slots__ = ("_errors", "_line", "count")

    def __init__(self, line: int, errors: RowErrors) -> None:
        self.count = 0
        self._line = line
        self._errors = errors

    def add(self, path: str, expectation: str, found: str) -> None:
        self.count += 1
        self._errors.add(self._line, path, expectation, found)
