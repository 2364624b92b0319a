"""Chooses the check of an upload by its first bytes. Not pure: temporary files, a process.

JSONL is checked line by line as it comes, Parquet as a whole by a process of its own: such a file says what is in it
only at its end, so its bytes wait in an unnamed temporary file. It knows no store and no tenant.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import structlog

from formats.row_errors import RowError
from formats.rows import PARQUET_MAGIC, Features
from services.gateway.files.line_check import DatasetLimits, DatasetReport, LineCheck

_LAST_WORDS_MAX = 2000
log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class ParquetLimits:
    """What one check may take; `spool_dir` None is the system's folder for temporary files."""

    check_s_max: float
    memory_bytes_max: int
    spool_dir: Path | None


class ContentCheck:
    """`feed` the chunks in order, `finish` once for the report, `close` in any case."""

    def __init__(self, limits: DatasetLimits, parquet: ParquetLimits) -> None:
        self._limits = limits
        self._parquet = parquet
        self._head = b""
        self._lines: LineCheck | None = None
        self._spool: IO[bytes] | None = None

    def feed(self, chunk: bytes) -> None:
        if self._lines is None and self._spool is None:
            self._head += chunk
            if len(self._head) < len(PARQUET_MAGIC):
                return
            chunk = self._head
            self._choose()
        if self._lines is not None:
            self._lines.feed(chunk)
        elif self._spool is not None:
            self._spool.write(chunk)

    def finish(self) -> DatasetReport:
        if self._spool is not None:
            return self._check_spooled(self._spool)
        if self._lines is None:
            # Fewer bytes than a choice needs.
            self._lines = LineCheck(self._limits)
            self._lines.feed(self._head)
        return self._lines.finish()

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()

    def _choose(self) -> None:
        if self._head.startswith(PARQUET_MAGIC):
            self._spool = tempfile.TemporaryFile(dir=self._parquet.spool_dir)  # noqa: SIM115 - closed by `close`
        else:
            self._lines = LineCheck(self._limits)
        self._head = b""

    def _check_spooled(self, spool: IO[bytes]) -> DatasetReport:
        spool.flush()
        spool.seek(0)
        limits = {
            "memory_bytes_max": self._parquet.memory_bytes_max,
            "lines_max": self._limits.lines_max,
            "errors_max": self._limits.errors_max,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "services.gateway.files.parquet_check", json.dumps(limits)],
                stdin=spool,
                capture_output=True,
                timeout=self._parquet.check_s_max,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _refused(f"a Parquet file that is checked within {self._parquet.check_s_max:g} s", "a larger one")
        if done.returncode:
            last_words = done.stderr.decode(errors="replace")[-_LAST_WORDS_MAX:]
            log.warning("parquet_check_failed", exit_code=done.returncode, last_words=last_words)
            limit = self._parquet.memory_bytes_max
            return _refused(f"a sound Parquet file, read within {limit} bytes of memory", "one that is not")
        answer = json.loads(done.stdout)
        return DatasetReport(
            format="tokens",
            line_count=answer["rows"],
            errors=tuple(RowError(**error) for error in answer["errors"]),
            error_count=answer["error_count"],
            features=Features(),
        )


def _refused(expectation: str, found: str) -> DatasetReport:
    error = RowError(line=0, path="$", expectation=expectation, found=found)
    return DatasetReport(format="tokens", line_count=0, errors=(error,), error_count=1, features=Features())
