"""Reads a Parquet file of token ids row by row, in bounded memory, and reports every broken row.

It knows no vocabulary. Columns: `input_ids`, lists of integers; perhaps `attention_mask` (1 on the row, 0 on padding
around it) and `labels` (the id itself, or -100 for a token without loss). Rows count from 1 in errors, 0 is the file as
a whole.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from services.trainer.train.data.rows.row_types import ROW_TOKENS_MAX, ROWS_MAX, UNLABELLED, RowErrors, Tokens

BATCH_ROWS = 256
# A group of rows is decompressed as a whole.
ROW_GROUP_BYTES_MAX = 1024**3
COLUMNS = ("input_ids", "attention_mask", "labels")
ID_MAX = 2**31 - 1
Column = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


def read_token_rows(path: Path, errors: RowErrors) -> Iterator[Tokens]:
    """The sound rows. Raises OSError when the file cannot be read."""
    try:
        with pq.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            if _check_schema(file, errors):
                yield from _rows(file, errors)
    except (pa.ArrowException, ValueError, TypeError) as error:
        errors.add(0, "$", f"a sound Parquet file: {str(error).splitlines()[0][:200]}")


def _check_schema(file: pq.ParquetFile, errors: RowErrors) -> bool:
    schema, before = file.schema_arrow, errors.count
    for name in schema.names:
        if name not in COLUMNS:
            shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)
            errors.add(0, f"$.{shown[:60]}", f"no such column: {', '.join(COLUMNS)} are known")
    for name in COLUMNS:
        count = schema.names.count(name)
        if count > 1 or (name == "input_ids" and not count):
            errors.add(0, f"$.{name}", "one column of this name")
        elif count and not _is_integer_list(schema.field(name).type):
            errors.add(0, f"$.{name}", f"a column of lists of integers, not of {schema.field(name).type}"[:200])
    metadata = file.metadata
    if metadata.num_rows > ROWS_MAX:
        errors.add(0, "$", f"at most {ROWS_MAX} rows")
    if any(metadata.row_group(index).total_byte_size > ROW_GROUP_BYTES_MAX for index in range(metadata.num_row_groups)):
        errors.add(0, "$", f"row groups of at most {ROW_GROUP_BYTES_MAX} bytes; write smaller ones")
    if not metadata.num_rows:
        errors.add(0, "$", "at least one row; the file is empty")
    return errors.count == before


def _is_integer_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_integer(kind.value_type))


def _rows(file: pq.ParquetFile, errors: RowErrors) -> Iterator[Tokens]:
    names = [name for name in COLUMNS if name in file.schema_arrow.names]
    line = 0
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names, use_threads=False):
        columns = {name: _column(batch.column(name)) for name in names}
        for index in range(batch.num_rows):
            line += 1
            row = _row(line, {name: _cell(column, index) for name, column in columns.items()}, errors)
            if row is not None:
                yield row


def _column(array: pa.Array) -> Column:
    """Values, offsets of the rows in them, and which rows hold nothing where integers should be."""
    lengths = array.value_lengths()
    bad = np.asarray(array.is_null()).copy()
    offsets = np.concatenate([[0], np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64))])
    values = array.flatten()
    if values.null_count:
        holes = np.flatnonzero(np.asarray(values.is_null()))
        bad[np.searchsorted(offsets, holes, side="right") - 1] = True
        values = values.fill_null(0)
    return values.to_numpy(zero_copy_only=False).astype(np.int64), offsets, bad


def _cell(column: Column, index: int) -> NDArray[np.int64] | None:
    values, offsets, bad = column
    return None if bad[index] else values[offsets[index] : offsets[index + 1]]


def _row(line: int, cells: dict[str, NDArray[np.int64] | None], errors: RowErrors) -> Tokens | None:
    before = errors.count
    for name, cell in cells.items():
        if cell is None:
            errors.add(line, f"$.{name}", "a list of integers without nulls")
    ids, mask, labels = (cells.get(name) for name in COLUMNS)
    if ids is None or errors.count > before:
        return None
    if not 0 < len(ids) <= ROW_TOKENS_MAX:
        errors.add(line, "$.input_ids", f"1 to {ROW_TOKENS_MAX} ids")
        return None
    for name, cell in cells.items():
        if cell is not None and len(cell) != len(ids):
            errors.add(line, f"$.{name}", f"as many entries as input_ids, which are {len(ids)}")
    if errors.count > before:
        return None
    _check_first(line, "input_ids", (ids < 0) | (ids > ID_MAX), f"ids from 0 to {ID_MAX}", errors)
    row = slice(0, len(ids)) if mask is None else _unpadded(line, mask, errors)
    if labels is not None:
        wrong = (labels != UNLABELLED) & ((labels != ids) | (False if mask is None else mask == 0))
        _check_first(line, "labels", wrong, f"the id at the same place, or {UNLABELLED}, as on all padding", errors)
    if errors.count > before:
        return None
    return Tokens(
        line=line,
        ids=ids[row].astype(np.int32),
        labelled=None if labels is None else labels[row] != UNLABELLED,
    )


def _unpadded(line: int, mask: NDArray[np.int64], errors: RowErrors) -> slice:
    seen = np.flatnonzero(mask == 1)
    if not len(seen) or int(seen[-1]) - int(seen[0]) + 1 != len(seen) or bool(((mask != 0) & (mask != 1)).any()):
        errors.add(line, "$.attention_mask", "one unbroken run of 1, with 0 for the padding around it")
        return slice(0, 0)
    return slice(int(seen[0]), int(seen[-1]) + 1)


def _check_first(line: int, name: str, wrong: NDArray[np.bool_], expected: str, errors: RowErrors) -> None:
    """One error a row and column: the first place is enough."""
    if wrong.any():
        errors.add(line, f"$.{name}[{int(wrong.argmax())}]", expected)
