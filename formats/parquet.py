"""Reads a Parquet file of token ids row by row, in bounded memory, with every error. It knows no vocabulary.

A few kilobytes can say that they are billions of values. What a file says of itself is judged before a page is read,
and what really comes is counted while it does.

Columns: `input_ids`, lists of integers; perhaps `attention_mask` (1 on the row, 0 on padding around it) and `labels`
(the id itself, or -100 for a token without loss). Rows count from 1 in errors, 0 is the file as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from formats.descriptions import describe, printable
from formats.row_errors import LineFaults, RowErrors
from formats.rows import ROW_TOKENS_MAX, UNLABELLED, Tokens
from formats.work import TooMuchWork, Work, WorkLimits

# Rows are decoded in batches of at most so many rows, and of about so many values where the file is honest.
BATCH_ROWS_MAX = 4096
BATCH_CELLS = 4 * 1024 * 1024
# A group of rows is decompressed as a whole.
ROW_GROUP_BYTES_MAX = 1024**3
COLUMNS = ("input_ids", "attention_mask", "labels")
ID_MAX = 2**31 - 1


class TokenRows:
    """Iterates over the sound rows. `count` is how many rows the file says it has, once the iteration began.

    A file that is more work than `limits` allow has that as its error, and `excess` says it as well; `work` is what was
    counted. Raises OSError when the file cannot be read.
    """

    def __init__(self, source: Path | IO[bytes], errors: RowErrors, limits: WorkLimits | None = None) -> None:
        self.count = 0
        self.work = Work()
        self.excess: TooMuchWork | None = None
        self._source = source
        self._errors = errors
        self._limits = limits or WorkLimits()

    def __iter__(self) -> Iterator[Tokens]:
        line = 1
        for columns, row_count in self._batches():
            is_sound = _is_sound(columns)
            for index in range(row_count):
                row = (
                    _sound_row(columns, index, line + index)
                    if is_sound
                    else _row(columns, index, LineFaults(line + index, self._errors), line + index)
                )
                if row is not None:
                    yield row
            line += row_count

    def check(self) -> None:
        """As the iteration, for the errors alone: batches without any are seen as a whole."""
        line = 1
        for columns, row_count in self._batches():
            if not _is_sound(columns):
                for index in range(row_count):
                    _row(columns, index, LineFaults(line + index, self._errors), line + index)
            line += row_count

    def _batches(self) -> "Iterator[tuple[dict[str, _Column], int]]":
        try:
            with pq.ParquetFile(self._source, memory_map=False, pre_buffer=False) as file:
                self.count = int(file.metadata.num_rows)
                whole = LineFaults(0, self._errors)
                _check_schema(file, whole)
                if whole.count:
                    return
                stated = _stated_work(file)
                self._limits.require(stated)
                batch_rows = max(1, min(BATCH_ROWS_MAX, BATCH_CELLS * stated.rows // max(stated.cells, 1)))
                names = [name for name in COLUMNS if name in file.schema_arrow.names]
                for batch in file.iter_batches(batch_size=batch_rows, columns=names, use_threads=False):
                    columns = {name: _column(batch.column(name)) for name in names}
                    cells = sum(len(column.values) for column in columns.values())
                    self.work += Work(rows=batch.num_rows, cells=cells, expanded_bytes=batch.nbytes)
                    self._limits.require(self.work)
                    yield columns, batch.num_rows
        except TooMuchWork as excess:
            self.excess = excess
            self._errors.add(0, "$", f"at most {excess.limit} {excess.unit}", f"{excess.found} {excess.unit}")
        except (pa.ArrowException, ValueError, TypeError) as error:
            self.count = 0
            add_unsound(self._errors, error)


def add_unsound(errors: RowErrors, error: Exception) -> None:
    """The file cannot be parsed."""
    errors.add(0, "$", "a sound Parquet file", describe(str(error)))


def _check_schema(file: pq.ParquetFile, faults: LineFaults) -> None:
    schema = file.schema_arrow
    if "input_ids" not in schema.names:
        expectation = (
            'the column input_ids, because Parquet holds token ids here; other rows come as JSONL: python -c "from '
            "datasets import Dataset; Dataset.from_parquet('FILE').to_json('rows.jsonl')\""
        )
        faults.add("$", expectation, f"the columns {', '.join(printable(name)[:60] for name in schema.names[:6])}")
        return
    for name in schema.names:
        if name not in COLUMNS:
            faults.add(f"$.{printable(name)[:60]}", f"no such column: {', '.join(COLUMNS)} are known", "a column")
    for name in COLUMNS:
        count = schema.names.count(name)
        if count > 1:
            faults.add(f"$.{name}", "one column of this name", f"{count} columns")
        elif count and not _is_integer_list(schema.field(name).type):
            faults.add(f"$.{name}", "a column of lists of integers", describe(str(schema.field(name).type)))
    metadata = file.metadata
    if any(metadata.row_group(index).total_byte_size > ROW_GROUP_BYTES_MAX for index in range(metadata.num_row_groups)):
        faults.add("$", f"row groups of at most {ROW_GROUP_BYTES_MAX} bytes", "a larger one")
    if not metadata.num_rows:
        faults.add("$", "at least one row", "an empty file")


def _stated_work(file: pq.ParquetFile) -> Work:
    """What the file says of itself; nothing of its pages is read."""
    metadata, schema = file.metadata, file.schema_arrow
    cells = expanded_bytes = 0
    for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
        for index in range(group.num_columns):
            column = group.column(index)
            name = column.path_in_schema.partition(".")[0]
            cells += column.num_values
            width_bits = schema.field(name).type.value_type.bit_width
            expanded_bytes += max(column.total_uncompressed_size, column.num_values * width_bits // 8)
    return Work(rows=metadata.num_rows, cells=cells, expanded_bytes=expanded_bytes)


def _is_integer_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_integer(kind.value_type))


@dataclass(frozen=True, slots=True)
class _Column:
    """The values of a batch and where each row begins in them; `bad` are rows without integers where some belong."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]
    bad: NDArray[np.bool_]

    def row(self, index: int) -> NDArray[np.int64]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


def _column(array: pa.Array) -> _Column:
    bad = np.asarray(array.is_null()).copy()
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = array.flatten()
    if values.null_count:
        holes = np.flatnonzero(np.asarray(values.is_null()))
        bad[np.searchsorted(offsets, holes, side="right") - 1] = True
        values = values.fill_null(0)
    return _Column(values.to_numpy(zero_copy_only=False).astype(np.int64), offsets, bad)


def _is_sound(columns: dict[str, _Column]) -> bool:
    """Whether no row of the batch has an error; seen over all of it at once, for speed."""
    ids = columns["input_ids"]
    if not len(ids.bad):
        return True
    lengths = np.diff(ids.offsets)
    if any(column.bad.any() or not np.array_equal(column.offsets, ids.offsets) for column in columns.values()):
        return False
    if int(lengths.min()) < 1 or int(lengths.max()) > ROW_TOKENS_MAX:
        return False
    if int(ids.values.min()) < 0 or int(ids.values.max()) > ID_MAX:
        return False
    mask, labels = columns.get("attention_mask"), columns.get("labels")
    if mask is not None and not _is_sound_mask(mask):
        return False
    if labels is None:
        return True
    labelled = labels.values != UNLABELLED
    wrong = labels.values != ids.values
    if mask is not None:
        wrong |= mask.values == 0
    return not bool((labelled & wrong).any())


def _is_sound_mask(mask: _Column) -> bool:
    """One unbroken run of 1 in every row; no row is empty."""
    if int(mask.values.min()) < 0 or int(mask.values.max()) > 1:
        return False
    before = np.concatenate([[0], mask.values[:-1]])
    before[mask.offsets[:-1]] = 0
    begins = (mask.values == 1) & (before == 0)
    return bool((np.add.reduceat(begins.astype(np.int64), mask.offsets[:-1]) == 1).all())


def _sound_row(columns: dict[str, _Column], index: int, line: int) -> Tokens:
    ids, mask, labels = columns["input_ids"].row(index), columns.get("attention_mask"), columns.get("labels")
    row = slice(0, len(ids))
    if mask is not None:
        seen = np.flatnonzero(mask.row(index))
        row = slice(int(seen[0]), int(seen[-1]) + 1)
    labelled = None if labels is None else labels.row(index)[row] != UNLABELLED
    return Tokens(line=line, ids=ids[row].astype(np.int32), labelled=labelled)


def _row(columns: dict[str, _Column], index: int, faults: LineFaults, line: int) -> Tokens | None:
    cells = {name: column.row(index) for name, column in columns.items()}
    for name, column in columns.items():
        if column.bad[index]:
            faults.add(f"$.{name}", "a list of integers without nulls", "null")
    if faults.count:
        return None
    ids, mask, labels = cells["input_ids"], cells.get("attention_mask"), cells.get("labels")
    if not 0 < len(ids) <= ROW_TOKENS_MAX:
        faults.add("$.input_ids", f"1 to {ROW_TOKENS_MAX} ids", f"{len(ids)} ids")
        return None
    for name, cell in cells.items():
        if len(cell) != len(ids):
            faults.add(f"$.{name}", f"as many entries as input_ids, which are {len(ids)}", f"{len(cell)} entries")
    if faults.count:
        return None
    _check_first("input_ids", ids, (ids < 0) | (ids > ID_MAX), f"ids from 0 to {ID_MAX}", faults)
    row = slice(0, len(ids)) if mask is None else _unpadded(mask, faults)
    labelled = None
    if labels is not None:
        labelled = labels != UNLABELLED
        wrong = labelled & ((labels != ids) if mask is None else (labels != ids) | (mask == 0))
        _check_first("labels", labels, wrong, f"the id at the same place, or {UNLABELLED}, as on all padding", faults)
    if faults.count:
        return None
    return Tokens(line=line, ids=ids[row].astype(np.int32), labelled=None if labelled is None else labelled[row])


def _unpadded(mask: NDArray[np.int64], faults: LineFaults) -> slice:
    seen = np.flatnonzero(mask == 1)
    unbroken = len(seen) and int(seen[-1]) - int(seen[0]) + 1 == len(seen)
    if not unbroken or bool(((mask != 0) & (mask != 1)).any()):
        expectation = "one unbroken run of 1, with 0 for the padding around it"
        faults.add("$.attention_mask", expectation, "another pattern")
        return slice(0, 0)
    return slice(int(seen[0]), int(seen[-1]) + 1)


def _check_first(
    name: str, values: NDArray[np.int64], wrong: NDArray[np.bool_], expectation: str, faults: LineFaults
) -> None:
    """One error a row and column: the first place says enough."""
    if wrong.any():
        place = int(wrong.argmax())
        faults.add(f"$.{name}[{place}]", expectation, describe(int(values[place])))
