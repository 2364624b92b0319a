"""Columns of token ids: what is a row of them, and every error by its row and place."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from formats import parquet
from formats.parquet import TokenRows
from formats.row_errors import RowErrors
from formats.work import Work, WorkLimits

TABLES: list[tuple[dict[str, Any], bool]] = [
    ({"input_ids": [[1, 2], [3]]}, True),
    ({"input_ids": [[0, 1, 2]], "attention_mask": [[0, 1, 1]], "labels": [[-100, -100, 2]]}, True),
    ({"input_ids": pa.array([[1], [2, 3]], pa.large_list(pa.uint16()))}, True),
    ({"ids": [[1]]}, False),
    ({"input_ids": [[1]], "position_ids": [[0]]}, False),
    ({"input_ids": [["a"]]}, False),
    ({"input_ids": [[1.5]]}, False),
    ({"input_ids": pa.array([], pa.list_(pa.int32()))}, False),
    ({"input_ids": [[1], None, [2, None], [], [-1], [2**31]]}, False),
    ({"input_ids": [[1, 2]], "labels": [[1]]}, False),
    ({"input_ids": [[1, 2]] * 3, "labels": [[1, 3], [-1, 2], None]}, False),
    ({"input_ids": [[1, 2, 3]] * 4, "attention_mask": [[1, 0, 1], [0, 0, 0], [1, 1, 2], [1, 1]]}, False),
    ({"input_ids": [[1, 2]], "attention_mask": [[1, 0]], "labels": [[1, 2]]}, False),
]


def places(path: Path) -> list[tuple[int, str]]:
    errors = RowErrors(kept_max=1000)
    list(TokenRows(path, errors))
    return [(error.line, error.path) for error in errors.kept]


@pytest.mark.parametrize(("columns", "is_good"), TABLES)
def test_a_file_is_good_or_has_errors(tmp_path: Path, columns: dict[str, Any], is_good: bool) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2)
    assert (not places(path)) == is_good


def test_every_broken_row_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1], None, [2, None], [], [-1], [2**31]]}), tmp_path / "t.parquet")
    found = [(2, ""), (3, ""), (4, ""), (5, "[0]"), (6, "[0]")]
    assert places(tmp_path / "t.parquet") == [(row, f"$.input_ids{place}") for row, place in found]


@pytest.mark.parametrize(("columns", "is_good"), TABLES)
def test_a_check_finds_what_reading_finds(tmp_path: Path, columns: dict[str, Any], is_good: bool) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path)
    errors = RowErrors(kept_max=1000)
    TokenRows(path, errors).check()
    assert [(error.line, error.path) for error in errors.kept] == places(path)


def test_a_file_that_says_too_little_of_itself_is_counted_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"input_ids": pa.array([[7] * 100] * 20_000, pa.list_(pa.int32()))}), path)
    monkeypatch.setattr(parquet, "_stated_work", lambda file: Work(rows=20_000, cells=1))
    errors = RowErrors()
    rows = TokenRows(path, errors, WorkLimits(cells_max=500_000))
    rows.check()
    assert rows.excess is not None
    assert (rows.excess.unit, rows.excess.limit, errors.count) == ("cells", 500_000, 1)
    # Not much later than where the limit is.
    assert 500_000 < rows.excess.found < 1_000_000


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1 and text PAR1", b"PAR1" + bytes(200)])
def test_a_torn_file_is_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    assert places(path) == [(0, "$")]
