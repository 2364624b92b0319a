"""Checks a Parquet file of token ids, as a process of its own: what a stranger's file does to the parser stays in here.

`python -m services.gateway.parquet_check LIMITS` with the file as standard input and the limits as JSON; the report is one JSON
document on stdout. The trainer reads such files by the same rules (a test holds the two against each other). It knows no vocabulary.
"""

import json
import resource
import sys
from dataclasses import asdict
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from services.gateway.dataset_check import FoundErrors
from services.gateway.dataset_rows import describe

UNLABELLED = -100
ROW_TOKENS_MAX = 16_777_216
BATCH_ROWS = 256
# A group of rows is decompressed as a whole.
ROW_GROUP_BYTES_MAX = 1024**3
COLUMNS = ("input_ids", "attention_mask", "labels")
ID_MAX = 2**31 - 1
Column = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


def main() -> int:
    limits = json.loads(sys.argv[1])
    # First of all: nothing of the file was read yet.
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes_max"], limits["memory_bytes_max"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    errors = FoundErrors(kept_max=limits["errors_max"])
    rows = check_tokens(sys.stdin.buffer, limits["lines_max"], errors)
    json.dump(
        {"rows": rows, "errors": [asdict(error) for error in errors.kept], "error_count": errors.count}, sys.stdout
    )
    return 0


def check_tokens(stream: IO[bytes], rows_max: int, errors: FoundErrors) -> int:
    """The number of rows; `stream` can seek."""
    try:
        with pq.ParquetFile(stream, pre_buffer=False) as file:
            if _check_schema(file, rows_max, errors):
                _check_rows(file, errors)
            return int(file.metadata.num_rows)
    except (pa.ArrowException, ValueError, TypeError, OSError) as error:
        errors.add(0, "$", "a sound Parquet file", describe(str(error)))
        return 0


def _check_schema(file: pq.ParquetFile, rows_max: int, errors: FoundErrors) -> bool:
    schema, before = file.schema_arrow, errors.count
    for name in schema.names:
        if name not in COLUMNS:
            shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)
            errors.add(0, f"$.{shown[:60]}", f"no such column: {', '.join(COLUMNS)} are known", "a column")
    for name in COLUMNS:
        count = schema.names.count(name)
        if count > 1 or (name == "input_ids" and not count):
            errors.add(0, f"$.{name}", "one column of this name", f"{count} columns")
        elif count and not _is_integer_list(schema.field(name).type):
            errors.add(0, f"$.{name}", "a column of lists of integers", describe(str(schema.field(name).type)))
    metadata = file.metadata
    if metadata.num_rows > rows_max:
        errors.add(0, "$", f"at most {rows_max} rows", f"{metadata.num_rows} rows")
    if any(metadata.row_group(index).total_byte_size > ROW_GROUP_BYTES_MAX for index in range(metadata.num_row_groups)):
        errors.add(0, "$", f"row groups of at most {ROW_GROUP_BYTES_MAX} bytes", "a larger one")
    if not metadata.num_rows:
        errors.add(0, "$", "at least one row", "an empty file")
    return errors.count == before


def _is_integer_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_integer(kind.value_type))


def _check_rows(file: pq.ParquetFile, errors: FoundErrors) -> None:
    names = [name for name in COLUMNS if name in file.schema_arrow.names]
    line = 0
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names, use_threads=False):
        columns = {name: _column(batch.column(name)) for name in names}
        for index in range(batch.num_rows):
            line += 1
            _check_row(line, {name: _cell(column, index) for name, column in columns.items()}, errors)


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


def _check_row(line: int, cells: dict[str, NDArray[np.int64] | None], errors: FoundErrors) -> None:
    before = errors.count
    for name, cell in cells.items():
        if cell is None:
            errors.add(line, f"$.{name}", "a list of integers without nulls", "null")
    ids, mask, labels = (cells.get(name) for name in COLUMNS)
    if ids is None or errors.count > before:
        return
    if not 0 < len(ids) <= ROW_TOKENS_MAX:
        errors.add(line, "$.input_ids", f"1 to {ROW_TOKENS_MAX} ids", f"{len(ids)} ids")
        return
    for name, cell in cells.items():
        if cell is not None and len(cell) != len(ids):
            expected = f"as many entries as input_ids, which are {len(ids)}"
            errors.add(line, f"$.{name}", expected, f"{len(cell)} entries")
    if errors.count > before:
        return
    _check_first(line, "input_ids", ids, (ids < 0) | (ids > ID_MAX), f"ids from 0 to {ID_MAX}", errors)
    if mask is not None and not _is_one_run(mask):
        expected = "one unbroken run of 1, with 0 for the padding around it"
        errors.add(line, "$.attention_mask", expected, "another pattern")
    if labels is not None:
        wrong = (labels != UNLABELLED) & ((labels != ids) | (False if mask is None else mask == 0))
        expected = f"the id at the same place, or {UNLABELLED}, as on all padding"
        _check_first(line, "labels", labels, wrong, expected, errors)


def _is_one_run(mask: NDArray[np.int64]) -> bool:
    seen = np.flatnonzero(mask == 1)
    unbroken = len(seen) and int(seen[-1]) - int(seen[0]) + 1 == len(seen)
    return bool(unbroken and not ((mask != 0) & (mask != 1)).any())


def _check_first(
    line: int, name: str, values: NDArray[np.int64], wrong: NDArray[np.bool_], expected: str, errors: FoundErrors
) -> None:
    """One error a row and column: the first place says enough."""
    if wrong.any():
        place = int(wrong.argmax())
        errors.add(line, f"$.{name}[{place}]", expected, describe(int(values[place])))


if __name__ == "__main__":
    sys.exit(main())
