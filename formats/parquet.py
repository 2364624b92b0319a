"""Reads a Parquet file of token ids row by row, in bounded memory, with every error. It knows no vocabulary.

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
from formats.rows import ROW_TOKENS_MAX, ROWS_MAX, UNLABELLED, Tokens

BATCH_ROWS = 256
# A group of rows is decompressed as a whole.
ROW_GROUP_BYTES_MAX = 1024**3
COLUMNS = ("input_ids", "attention_mask", "labels")
ID_MAX = 2**31 - 1


class TokenRows:
    """Iterates over the sound rows. `count` is how many rows the file says it has, once the iteration began.

    Raises OSError when the file cannot be read.
    """

    def __init__(self, source: Path | IO[bytes], errors: RowErrors, rows_max: int = ROWS_MAX) -> None:
        self.count = 0
        self._source = source
        self._errors = errors
        self._rows_max = rows_max

    def __iter__(self) -> Iterator[Tokens]:
        try:
            with pq.ParquetFile(self._source, memory_map=False, pre_buffer=False) as file:
                self.count = int(file.metadata.num_rows)
                whole = LineFaults(0, self._errors)
                _check_schema(file, self._rows_max, whole)
                if not whole.count:
                    yield from _rows(file, self._errors)
        except (pa.ArrowException, ValueError, TypeError) as error:
            self.count = 0
            add_unsound(self._errors, error)


def add_unsound(errors: RowErrors, error: Exception) -> None:
    """The file cannot be parsed."""
    errors.add(0, "$", "a sound Parquet file", describe(str(error)))


def _check_schema(file: pq.ParquetFile, rows_max: int, faults: LineFaults) -> None:
    schema = file.schema_arrow
    for name in schema.names:
        if name not in COLUMNS:
            faults.add(f"$.{printable(name)[:60]}", f"no such column: {', '.join(COLUMNS)} are known", "a column")
    for name in COLUMNS:
        count = schema.names.count(name)
        if count > 1 or (name == "input_ids" and not count):
            faults.add(f"$.{name}", "one column of this name", f"{count} columns")
        elif count and not _is_integer_list(schema.field(name).type):
            faults.add(f"$.{name}", "a column of lists of integers", describe(str(schema.field(name).type)))
    metadata = file.metadata
    if metadata.num_rows > rows_max:
        faults.add("$", f"at most {rows_max} rows", f"{metadata.num_rows} rows")
    if any(metadata.row_group(index).total_byte_size > ROW_GROUP_BYTES_MAX for index in range(metadata.num_row_groups)):
        faults.add("$", f"row groups of at most {ROW_GROUP_BYTES_MAX} bytes", "a larger one")
    if not metadata.num_rows:
        faults.add("$", "at least one row", "an empty file")


def _is_integer_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_integer(kind.value_type))


@dataclass(frozen=True, slots=True)
class _Column:
    """The values of a batch and where each row begins in them; `bad` are rows without integers where some belong."""

    values: NDArray[np.int64]
    offsets: list[int]
    bad: list[bool]

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
    return _Column(values.to_numpy(zero_copy_only=False).astype(np.int64), offsets.tolist(), bad.tolist())


def _rows(file: pq.ParquetFile, errors: RowErrors) -> Iterator[Tokens]:
    names = [name for name in COLUMNS if name in file.schema_arrow.names]
    line = 0
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names, use_threads=False):
        columns = {name: _column(batch.column(name)) for name in names}
        # Looked at for the whole batch at once, for speed; a row only says where.
        ids = columns["input_ids"].values
        in_range = not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) <= ID_MAX)
        for index in range(batch.num_rows):
            line += 1
            row = _row(columns, index, in_range, LineFaults(line, errors), line)
            if row is not None:
                yield row


def _row(columns: dict[str, _Column], index: int, in_range: bool, faults: LineFaults, line: int) -> Tokens | None:
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
    if not in_range:
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
