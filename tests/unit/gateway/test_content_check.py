"""An upload is checked as what its first bytes say: token ids by a process within bounds, all else as lines."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chassis.errors import ResourceExhausted
from services.gateway.files.content_check import CheckProcess, ContentCheck, ProcessLimits
from services.gateway.files.dataset_report import DatasetLimits, DatasetReport
from services.gateway.files.line_check import LineCheck

LIMITS = DatasetLimits(
    line_bytes_max=1 << 24,
    lines_max=1000,
    messages_max=1000,
    errors_max=1000,
    cells_max=10_000_000,
    expanded_bytes_max=1 << 30,
)
PROCESS = ProcessLimits(inline_bytes_max=1000, check_s_max=60, memory_bytes_max=4 << 30, spool_dir=None)


def check(content: bytes, limits: DatasetLimits = LIMITS, chunk_bytes: int = 1 << 20, **process: Any) -> DatasetReport:
    checking = ContentCheck(limits, replace(PROCESS, **process))
    try:
        for start in range(0, len(content), chunk_bytes):
            checking.feed(content[start : start + chunk_bytes])
        return checking.finish()
    finally:
        checking.close()


def test_the_program_that_checks_sees_nothing_of_the_services_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEMESH_GATEWAY_DATABASE_URL", "postgresql://gateway:secret@127.0.0.1/finemesh")
    checking = CheckProcess(LIMITS, PROCESS)
    try:
        # The kernel shows it a moment after the program has begun.
        while not (seen := Path(f"/proc/{checking.pid}/environ").read_bytes()):
            time.sleep(0.01)
    finally:
        checking.close()
    assert b"PYTHONUNBUFFERED" in seen
    assert b"FINEMESH" not in seen


def token_file(ids: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table({"input_ids": ids}), content, **options)
    return content.getvalue()


def test_an_uploaded_token_file_is_checked_by_a_process_of_its_own(tmp_path: Path) -> None:
    report = check(token_file([[1, 2], [-1]]), chunk_bytes=3, spool_dir=tmp_path)
    assert (report.format, report.line_count, report.error_count) == ("tokens", 2, 1)
    assert (report.errors[0].line, report.errors[0].path) == (2, "$.input_ids[0]")
    assert (report.work.rows, report.work.cells) == (2, 3)
    # Nothing is left where the bytes waited.
    assert list(tmp_path.iterdir()) == []


def test_a_check_out_of_bounds_is_an_error_of_the_file() -> None:
    content = token_file([[1] * 5_000_000])
    for limits in ({"check_s_max": 0.01}, {"memory_bytes_max": 64 << 20}):
        report = check(content, **limits)
        assert (report.error_count, report.errors[0].line) == (1, 0)


@pytest.mark.parametrize(
    ("limits", "limit", "found"),
    [
        ({"lines_max": 99_999}, "dataset_lines_max", {"rows": "100000"}),
        ({"cells_max": 199_999}, "dataset_cells_max", {"cells": "200000"}),
        ({"expanded_bytes_max": 1_599_999}, "dataset_expanded_bytes_max", {"expanded_bytes": "1600000"}),
    ],
)
def test_a_few_bytes_that_are_much_work_are_refused_by_what_they_say_of_themselves(limits, limit, found) -> None:
    content = token_file(pa.array([[7, 7]] * 100_000, pa.list_(pa.int64())), compression="zstd")
    assert len(content) < 5000
    with pytest.raises(ResourceExhausted) as told:
        check(content, replace(LIMITS, **{"lines_max": 1_000_000, **limits}))
    assert told.value.reason == "SIZE_LIMIT"
    assert told.value.metadata["limit"] == limit
    assert found.items() <= told.value.metadata.items()


def test_lines_too_many_end_their_check_at_once() -> None:
    with pytest.raises(ResourceExhausted, match="dataset_lines_max is 1000"):
        check(b'{"text": "x"}\n' * 1_000_000)


def test_a_process_checks_lines_as_this_one_does() -> None:
    content = b'{"text": "x"}\n' * 500 + b'{"text": "y", "weight": 0.5}\n{"text": ""}\n' + b'{"text": "z"}\n' * 200
    alone = check(content, inline_bytes_max=1 << 20)
    assert (alone.line_count, [error.line for error in alone.errors]) == (702, [502])
    assert check(content, chunk_bytes=700) == alone
    assert check(content, memory_bytes_max=1 << 20).errors[0].line == 0


def test_closing_ends_a_check_that_another_thread_waits_for() -> None:
    checking = ContentCheck(LIMITS, PROCESS)
    checking.feed(b"x" * 2000)
    with ThreadPoolExecutor() as threads:
        finished = threads.submit(checking.finish)
        checking.close()
        assert finished.result(30).error_count == 1
    checking.feed(b"more")


@pytest.mark.parametrize("content", [b"", b"{", b"PAR", b'{"text": "x"}'])
def test_short_content_is_checked_as_lines(content: bytes) -> None:
    lines_alone = LineCheck(LIMITS)
    lines_alone.feed(content)
    assert check(content, chunk_bytes=1, check_s_max=1, memory_bytes_max=1) == lines_alone.finish()
