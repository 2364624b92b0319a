"""An upload is checked as what its first bytes say: token ids by a process within bounds, all else as lines."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.gateway.files.content_check import ContentCheck, ParquetLimits
from services.gateway.files.line_check import DatasetLimits, LineCheck

LIMITS = DatasetLimits(line_bytes_max=1 << 24, lines_max=1000, messages_max=1000, errors_max=1000)


def test_an_uploaded_token_file_is_checked_by_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"input_ids": [[1, 2], [-1]]}), path)
    check = ContentCheck(LIMITS, ParquetLimits(check_s_max=60, memory_bytes_max=4 << 30, spool_dir=tmp_path))
    for piece in (path.read_bytes()[:3], path.read_bytes()[3:]):
        check.feed(piece)
    report = check.finish()
    check.close()
    assert (report.format, report.line_count, report.error_count) == ("tokens", 2, 1)
    assert (report.errors[0].line, report.errors[0].path) == (2, "$.input_ids[0]")
    # Nothing is left where the bytes waited.
    assert [left.name for left in tmp_path.iterdir()] == ["t.parquet"]


def test_a_parquet_check_out_of_bounds_is_an_error_of_the_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1] * 5_000_000]}), tmp_path / "t.parquet")
    for limits in (
        ParquetLimits(check_s_max=0.01, memory_bytes_max=4 << 30, spool_dir=None),
        ParquetLimits(check_s_max=60, memory_bytes_max=64 << 20, spool_dir=None),
    ):
        check = ContentCheck(LIMITS, limits)
        check.feed((tmp_path / "t.parquet").read_bytes())
        report = check.finish()
        check.close()
        assert (report.error_count, report.errors[0].line) == (1, 0)


@pytest.mark.parametrize("content", [b"", b"{", b"PAR", b'{"text": "x"}'])
def test_short_content_is_checked_as_lines(content: bytes) -> None:
    lines_alone = LineCheck(LIMITS)
    lines_alone.feed(content)
    check = ContentCheck(LIMITS, ParquetLimits(check_s_max=1, memory_bytes_max=1, spool_dir=None))
    for byte in content:
        check.feed(bytes([byte]))
    assert check.finish() == lines_alone.finish()
