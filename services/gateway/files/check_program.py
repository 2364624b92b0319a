"""Checks one uploaded file as a process of its own, so that a stranger's file harms no other. Not pure: process limits.

`python -m services.gateway.files.check_program LIMITS` with the file as standard input and the limits as JSON; the
report is one JSON document on standard output. It ends when its input does. JSONL is checked as it comes; a Parquet
file says what is in it only at its end, so its bytes wait in an unnamed temporary file.
"""

import json
import os
import resource
import sys
import tempfile
from dataclasses import asdict
from typing import IO, Any

from formats.row_errors import RowErrors
from formats.rows import PARQUET_MAGIC
from formats.work import TooMuchWork, Work, WorkLimits
from services.gateway.files.dataset_report import DatasetLimits
from services.gateway.files.line_check import LineCheck
from services.gateway.files.plain_lines import PlainLines

READ_BYTES = 1024 * 1024
# Behind whoever answers calls.
_NICENESS = 10


def main() -> int:
    given = json.loads(sys.argv[1])
    # First of all: nothing of the file was read yet.
    resource.setrlimit(resource.RLIMIT_AS, (given["memory_bytes_max"], given["memory_bytes_max"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICENESS)
    limits = DatasetLimits(**given["dataset"])
    stream = sys.stdin.buffer
    head = stream.read(READ_BYTES)
    is_parquet = head.startswith(PARQUET_MAGIC)
    report = _check_parquet(head, stream, limits, given["spool_dir"]) if is_parquet else _check(head, stream, limits)
    json.dump(report, sys.stdout)
    return 0


def _check(block: bytes, stream: IO[bytes], limits: DatasetLimits) -> dict[str, Any]:
    check = LineCheck(limits, PlainLines)
    try:
        while block:
            check.feed(block)
            block = stream.read(READ_BYTES)
        return {"report": asdict(check.finish())}
    except TooMuchWork as excess:
        return _excess(excess)


def _check_parquet(block: bytes, stream: IO[bytes], limits: DatasetLimits, spool_dir: str | None) -> dict[str, Any]:
    with tempfile.TemporaryFile(dir=spool_dir) as spool:
        try:
            while block:
                spool.write(block)
                block = stream.read(READ_BYTES)
            spool.seek(0)
        except OSError as error:
            # Nothing about the file: the disk refused its bytes.
            return {"unwritten": error.errno}
        errors = RowErrors(kept_max=limits.errors_max)
        rows_count, work, excess = check_tokens(spool, limits.work(), errors)
    if excess is not None:
        return _excess(excess)
    kept = [asdict(error) for error in errors.kept]
    report = {"format": "tokens", "line_count": rows_count, "errors": kept, "error_count": errors.count}
    return {"report": {**report, "features": {}, "work": asdict(work)}}


def check_tokens(stream: IO[bytes], limits: WorkLimits, errors: RowErrors) -> tuple[int, Work, TooMuchWork | None]:
    """The number of rows, what they are as work, and what of it is too much; `stream` can seek."""
    # Arrow takes a moment to load that JSONL need not pay.
    from formats.parquet import TokenRows, add_unsound  # noqa: PLC0415

    rows = TokenRows(stream, errors, limits)
    try:
        rows.check()
    except OSError as error:
        # Arrow says so of pages that cannot be decompressed, too.
        add_unsound(errors, error)
        return 0, Work(), None
    return rows.count, rows.work, rows.excess


def _excess(excess: TooMuchWork) -> dict[str, Any]:
    return {"excess": {"unit": excess.unit, "found": excess.found, "limit": excess.limit}}


if __name__ == "__main__":
    sys.exit(main())
