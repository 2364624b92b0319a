"""Analysis answers with counts or with every reason against, and starts without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.trainer.train.analysis.main import answer_request

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(9)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ask(**request: Any) -> dict[str, Any]:
    return answer_request(json.dumps(request).encode())


def test_counts_are_those_of_the_whole_run(model_directory: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ROWS)
    answer = ask(
        base_model={"directory": str(model_directory)},
        train_file=train,
        validation_file=write(tmp_path / "held.jsonl", ROWS[:2]),
        epochs=3,
        evaluations=10,
        batch_size=4,
        packing=False,
    )
    assert answer["ok"]
    assert answer["train"]["format"] == "instruction"
    assert (answer["train"]["rows"], answer["train"]["sequences"], answer["steps_per_epoch"]) == (9, 9, 3)
    assert answer["billed_train_tokens"] == 3 * answer["train_token_count"]
    assert answer["billed_validation_tokens"] == 30 * answer["validation_token_count"]
    assert answer["train"]["token_count"] > answer["train"]["trained_token_count"] > 0
    assert answer["max_seq_length"] == 256


def test_packing_changes_sequences_but_no_count(model_directory: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ROWS)
    request = {"base_model": {"directory": str(model_directory)}, "train_file": train}
    packed, plain = ask(**request, packing=True), ask(**request, packing=False)
    assert packed["train_token_count"] == plain["train_token_count"]
    assert packed["train"]["sequences"] < plain["train"]["sequences"]
    assert packed["packing_digest"] != plain["packing_digest"]
    again = ask(**request, packing=True)
    assert packed["train"].pop("rows_per_second") > 0
    assert again["train"].pop("rows_per_second") > 0
    assert packed == again


def test_broken_rows_of_both_files_are_reported_together(model_directory: Path, tmp_path: Path) -> None:
    answer = ask(
        base_model={"directory": str(model_directory)},
        train_file=write(tmp_path / "train.jsonl", [*ROWS, {"prompt": 1, "completion": "x"}]),
        validation_file=write(tmp_path / "held.jsonl", [[]]),
    )
    assert (answer["ok"], answer["reason"], answer["error_count"]) == (False, "DATASET_INVALID", 2)
    assert [(e["file"], e["line"], e["path"]) for e in answer["errors"]] == [
        ("train", 10, "$.prompt"),
        ("validation", 1, "$"),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_seq_length": 100_000}, "INVALID_FIELD"),
        ({"max_seq_length": 16, "train_file": "LONG"}, "TRAINING_INPUT_INVALID"),
        ({"train_file": "/nowhere.jsonl"}, "TRAINING_INPUT_INVALID"),
        ({"base_model": {"directory": "/nowhere"}}, "MODEL_INVALID"),
        ({"epochs": 0, "evaluations": 3}, "INVALID_FIELD"),
    ],
)
def test_refusals_are_typed(model_directory: Path, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    long = write(tmp_path / "long.jsonl", [{"prompt": "word " * 40, "completion": "x"}])
    train = write(tmp_path / "train.jsonl", ROWS)
    request = {"base_model": {"directory": str(model_directory)}, "train_file": train, **change}
    if request["train_file"] == "LONG":
        request["train_file"] = long
    answer = ask(**request)
    assert (answer["ok"], answer["reason"]) == (False, reason)
    assert answer["message"]


@pytest.mark.parametrize("request_bytes", [b"", b"{", b"[]", b"null", b"\xff"])
def test_a_request_that_is_none_gets_an_answer(request_bytes: bytes) -> None:
    assert answer_request(request_bytes)["reason"] == "INVALID_FIELD"


def test_the_process_loads_no_torch(model_directory: Path, tmp_path: Path) -> None:
    request = {"base_model": {"directory": str(model_directory)}, "train_file": write(tmp_path / "t.jsonl", ROWS)}
    program = (
        "import sys; from services.trainer.train.analysis.main import main; main(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(request), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
