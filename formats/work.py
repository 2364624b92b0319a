"""How much work a file is once it is unpacked, which its size on disk does not say, and how much may be. Pure."""

from dataclasses import dataclass

from formats.rows import ROWS_MAX

# A billion tokens with mask and labels, and what 64-bit columns of them take.
CELLS_MAX = 3_000_000_000
# What a row costs beside its values, as bytes of JSON.
ROW_WORK_BYTES = 256
EXPANDED_BYTES_MAX = 32 * 1024**3


@dataclass(frozen=True, kw_only=True)
class Work:
    """`cells` are values over all columns, `expanded_bytes` what they take without encoding and compression."""

    rows: int = 0
    cells: int = 0
    expanded_bytes: int = 0

    @property
    def in_bytes(self) -> int:
        """As the bytes of JSON that take about as long to read: a row costs something, however short it is."""
        return max(self.expanded_bytes, self.rows * ROW_WORK_BYTES)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            rows=self.rows + other.rows,
            cells=self.cells + other.cells,
            expanded_bytes=self.expanded_bytes + other.expanded_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class WorkLimits:
    rows_max: int = ROWS_MAX
    cells_max: int = CELLS_MAX
    expanded_bytes_max: int = EXPANDED_BYTES_MAX

    def require(self, work: Work) -> None:
        """Raises TooMuchWork for the first limit that the file is over."""
        for unit, found, limit in (
            ("rows", work.rows, self.rows_max),
            ("cells", work.cells, self.cells_max),
            ("expanded bytes", work.expanded_bytes, self.expanded_bytes_max),
        ):
            if found > limit:
                raise TooMuchWork(unit, found, limit)


class TooMuchWork(Exception):
    """`unit` is rows, cells or expanded bytes; `found` is how many there are, or how many had come when it was seen."""

    def __init__(self, unit: str, found: int, limit: int) -> None:
        super().__init__(f"{found} {unit}, and at most {limit} are allowed")
        self.unit = unit
        self.found = found
        self.limit = limit
