"""Token ids as Parquet: what is read, which rows are refused where, and which tokens are trained."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from formats.rows import Tokens
from services.trainer.train.analysis.main import answer_request
from services.trainer.train.data.tokens.row_reader import RowReader


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def read(path: Path) -> tuple[list[Any], list[tuple[int, str]]]:
    reader = RowReader(path)
    rows = list(reader)
    return rows, [(error.line, error.path) for error in reader.errors.kept]


def ask(folder: Path, path: Path, **request: Any) -> dict[str, Any]:
    document = {"base_model": {"directory": str(folder)}, "train_file": str(path), **request}
    return answer_request(json.dumps(document).encode())


def test_padding_is_taken_off_and_labels_are_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.parquet",
        input_ids=[[0, 5, 6, 7], [8, 9], [3]],
        attention_mask=[[0, 1, 1, 1], [1, 1], [1]],
        labels=[[-100, -100, 6, 7], [8, 9], [-100]],
    )
    rows, errors = read(path)
    assert errors == []
    assert [row.ids.tolist() for row in rows] == [[5, 6, 7], [8, 9], [3]]
    assert [row.labelled.tolist() for row in rows] == [[False, True, True], [True, True], [False]]
    assert all(isinstance(row, Tokens) for row in rows)


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.uint16(), pa.int8()])
def test_integers_of_any_width_are_read(tmp_path: Path, kind: Any) -> None:
    path = write(tmp_path / "t.parquet", input_ids=pa.array([[1, 2], [3]], pa.large_list(kind)))
    assert [row.ids.tolist() for row in read(path)[0]] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("columns", "errors"),
    [
        ({"ids": [[1]]}, [(0, "$")]),
        ({"input_ids": [[1]], "ids": [[1]]}, [(0, "$.ids")]),
        ({"input_ids": [[1]], "position_ids": [[0]]}, [(0, "$.position_ids")]),
        ({"input_ids": [1, 2]}, [(0, "$.input_ids")]),
        ({"input_ids": [[1.5]]}, [(0, "$.input_ids")]),
        ({"input_ids": [["a"]]}, [(0, "$.input_ids")]),
        ({"input_ids": [[1]], "labels": [1]}, [(0, "$.labels")]),
        ({"input_ids": pa.array([], pa.list_(pa.int32()))}, [(0, "$")]),
        ({"input_ids": [[1], None, [2, None], []]}, [(2, "$.input_ids"), (3, "$.input_ids"), (4, "$.input_ids")]),
        ({"input_ids": [[1], [2, -1]]}, [(2, "$.input_ids[1]")]),
        ({"input_ids": [[2**31]]}, [(1, "$.input_ids[0]")]),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, [(1, "$.labels")]),
        ({"input_ids": [[1, 2]], "labels": [[1, 3]]}, [(1, "$.labels[1]")]),
        ({"input_ids": [[1, 2]], "labels": [[-100, -1]]}, [(1, "$.labels[1]")]),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, [(1, "$.attention_mask")]),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, [(1, "$.attention_mask")]),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, [(1, "$.attention_mask")]),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, [(1, "$.attention_mask")]),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1, 0]], "labels": [[1, 2]]},
            [(1, "$.labels[1]")],
        ),
    ],
)
def test_a_broken_file_or_row_is_named(tmp_path: Path, columns: Any, errors: list[tuple[int, str]]) -> None:
    assert read(write(tmp_path / "t.parquet", **columns))[1] == errors


@pytest.mark.parametrize("damage", [b"PAR1", b"PAR1" + b"\x00" * 100, b"PAR1 and text PAR1"])
def test_a_torn_file_is_one_error(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(damage)
    assert read(path)[1] == [(0, "$")]


def test_labels_decide_unless_everything_is_trained(model_directory: Path, tmp_path: Path) -> None:
    labelled = write(tmp_path / "a.parquet", input_ids=[[5, 6, 7, 8]], labels=[[-100, -100, 7, 8]])
    bare = write(tmp_path / "b.parquet", input_ids=[[5, 6, 7, 8]])
    trained = {
        (path.name, mode): ask(model_directory, path, train_on_inputs=mode)["train"]["trained_token_count"]
        for path, mode in ((labelled, "auto"), (labelled, False), (labelled, True), (bare, "auto"), (bare, True))
    }
    assert trained == {
        ("a.parquet", "auto"): 2,
        ("a.parquet", False): 2,
        ("a.parquet", True): 3,
        ("b.parquet", "auto"): 3,
        ("b.parquet", True): 3,
    }
    refused = ask(model_directory, bare, train_on_inputs=False)
    assert (refused["reason"], refused["violations"][0]["field"]) == ("INVALID_FIELD", "train_on_inputs")


def test_ids_are_held_against_the_vocabulary(model_directory: Path, tmp_path: Path) -> None:
    answer = ask(model_directory, write(tmp_path / "t.parquet", input_ids=[[1, 2], [3, 512]]))
    assert [(error["line"], error["path"]) for error in answer["errors"]] == [(2, "$.input_ids[1]")]
    assert "511" in answer["errors"][0]["expected"]


def test_rows_of_text_in_parquet_are_one_error_with_the_way_to_jsonl(tmp_path: Path) -> None:
    reader = RowReader(write(tmp_path / "t.parquet", prompt=["a"], completion=["b"]))
    assert list(reader) == []
    (error,) = reader.errors.kept
    assert error.found == "the columns prompt, completion"
    assert "Dataset.from_parquet('FILE').to_json('rows.jsonl')" in error.expectation
