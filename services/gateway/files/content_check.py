"""The check of one upload. Not pure: processes.

What is small is checked right here; everything else, and all Parquet, by a process of its own that gets the bytes as
they come (check_program.py). It knows no store and no tenant. Every method blocks.
"""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from chassis.errors import ResourceExhausted, disk_full, is_disk_full
from chassis.spawn import harmless_environment
from formats.row_errors import RowError
from formats.rows import PARQUET_MAGIC, Features
from formats.work import TooMuchWork, Work
from services.gateway.files.dataset_report import DatasetLimits, DatasetReport, report_of
from services.gateway.files.line_check import LineCheck

_LAST_WORDS_MAX = 2000
_PROGRAM = "services.gateway.files.check_program"
# Threads of libraries would take address space for each core of the machine, of which a check has a bounded amount.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
# The setting behind each limit of work.
_SETTINGS = {
    "rows": "dataset_lines_max",
    "cells": "dataset_cells_max",
    "expanded bytes": "dataset_expanded_bytes_max",
}
log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class ProcessLimits:
    """What the process of one check may take; `spool_dir` None is the system's folder for temporary files.

    Up to `inline_bytes_max` of JSONL need no process.
    """

    inline_bytes_max: int
    check_s_max: float
    memory_bytes_max: int
    spool_dir: Path | None


class ContentCheck:
    """`feed` the chunks in order, `finish` once for the report, `close` in any case, also while another method runs.

    All but `close` raise ResourceExhausted for a file that is more work than the limits allow.
    """

    def __init__(self, limits: DatasetLimits, process_limits: ProcessLimits) -> None:
        self._limits = limits
        self._process_limits = process_limits
        self._head: list[bytes] = []
        self._head_bytes = 0
        self._process: CheckProcess | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self.is_parquet = False

    def feed(self, chunk: bytes) -> None:
        with self._lock:
            if self._is_closed:
                return
            if self._process is None:
                self._head.append(chunk)
                self._head_bytes += len(chunk)
                if self._is_small():
                    return
                self._process = CheckProcess(self._limits, self._process_limits)
                chunk = b"".join(self._head)
                self._head.clear()
            self._process.feed(chunk)

    def finish(self) -> DatasetReport:
        try:
            with self._lock:
                if self._process is not None:
                    return self._process.finish()
                lines = LineCheck(self._limits)
                lines.feed(b"".join(self._head))
                return lines.finish()
        except TooMuchWork as excess:
            raise _refusal(excess) from None

    def close(self) -> None:
        self._is_closed = True
        if self._process is not None:
            # Whoever waits for it in another thread goes on.
            self._process.kill()
        with self._lock:
            if self._process is not None:
                self._process.close()

    def _is_small(self) -> bool:
        if not self.is_parquet:
            self.is_parquet = b"".join(self._head[: len(PARQUET_MAGIC)]).startswith(PARQUET_MAGIC)
        return not self.is_parquet and self._head_bytes <= self._process_limits.inline_bytes_max


class CheckProcess:
    """One run of the program that checks; a file that ends it is a file with an error."""

    def __init__(self, limits: DatasetLimits, process_limits: ProcessLimits) -> None:
        self._process_limits = process_limits
        spool_dir = process_limits.spool_dir
        given = {
            "dataset": asdict(limits),
            "memory_bytes_max": process_limits.memory_bytes_max,
            "spool_dir": None if spool_dir is None else str(spool_dir),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pipesize=1024 * 1024,
            env=harmless_environment(os.environ) | _ONE_THREAD,
        )
        self._has_ended = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def feed(self, chunk: bytes) -> None:
        assert self._process.stdin is not None
        rest = memoryview(chunk)
        while rest and not self._has_ended:
            try:
                rest = rest[self._process.stdin.write(rest) :]
            except BrokenPipeError:
                # It has seen enough, or failed; `finish` says which.
                self._has_ended = True

    def finish(self) -> DatasetReport:
        limits = self._process_limits
        try:
            output, last_words = self._process.communicate(timeout=limits.check_s_max)
        except subprocess.TimeoutExpired:
            return _unreadable(f"a file that is checked within {limits.check_s_max:g} s", "one that takes longer")
        if self._process.returncode:
            text = last_words.decode(errors="replace")[-_LAST_WORDS_MAX:]
            log.warning("dataset_check_failed", exit_code=self._process.returncode, last_words=text)
            return _unreadable(f"a sound file, read within {limits.memory_bytes_max} bytes of memory", "another one")
        answer = json.loads(output)
        if "unwritten" in answer:
            error = OSError(answer["unwritten"], "the file could not be kept while it was checked")
            raise disk_full("the disk on which files are checked") if is_disk_full(error) else error
        if "excess" in answer:
            raise TooMuchWork(**answer["excess"])
        return report_of(answer["report"])

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        self._process.wait()


def _refusal(excess: TooMuchWork) -> ResourceExhausted:
    setting = _SETTINGS[excess.unit]
    return ResourceExhausted(
        "SIZE_LIMIT",
        f"the file has {excess.found} {excess.unit} or more and the limit {setting} is {excess.limit}; split it",
        metadata={"limit": setting, "limit_value": str(excess.limit), excess.unit.replace(" ", "_"): str(excess.found)},
    )


def _unreadable(expectation: str, found: str) -> DatasetReport:
    error = RowError(line=0, path="$", expectation=expectation, found=found)
    return DatasetReport(format=None, line_count=0, errors=(error,), error_count=1, features=Features(), work=Work())
