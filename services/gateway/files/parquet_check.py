"""Checks a Parquet file as a process of its own, so that a stranger's file harms no other. Not pure: process limits.

`python -m services.gateway.files.parquet_check LIMITS` with the file as standard input and the limits as JSON; the
report is one JSON document on standard output.
"""

import json
import resource
import sys
from dataclasses import asdict
from typing import IO

from formats.parquet import TokenRows, add_unsound
from formats.row_errors import RowErrors


def main() -> int:
    limits = json.loads(sys.argv[1])
    # First of all: nothing of the file was read yet.
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes_max"], limits["memory_bytes_max"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    errors = RowErrors(kept_max=limits["errors_max"])
    rows = check_tokens(sys.stdin.buffer, limits["lines_max"], errors)
    json.dump(
        {"rows": rows, "errors": [asdict(error) for error in errors.kept], "error_count": errors.count}, sys.stdout
    )
    return 0


def check_tokens(stream: IO[bytes], rows_max: int, errors: RowErrors) -> int:
    """The number of rows; `stream` can seek."""
    rows = TokenRows(stream, errors, rows_max)
    try:
        for _ in rows:
            continue
    except OSError as error:
        # Arrow says so of pages that cannot be decompressed, too.
        add_unsound(errors, error)
        return 0
    return rows.count


if __name__ == "__main__":
    sys.exit(main())
