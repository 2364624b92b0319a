"""Analysis answers with counts or with every reason against, and starts without torch."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from formats.prompts import render_time
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
        validation_file=write(tmp_path / "held.jsonl", [{"words": "x"}]),
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


@pytest.mark.parametrize("where", ["always", "for one row"])
def test_a_template_that_loops_is_refused(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(render_time, "RENDER_S_MAX", 0.2)
    base = tmp_path / "base"
    shutil.copytree(model_directory, base)
    when = "true" if where == "always" else "messages[0].content == 'forever'"
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (base / "chat_template.jinja").write_text(
        f"{{% if {when} %}}{loop}{{% endif %}}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}.\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    endless = [{"role": "user", "content": "forever"}, turns[1]]
    train = write(tmp_path / "train.jsonl", [{"messages": turns}, {"messages": endless}])
    answer = ask(base_model={"directory": str(base)}, train_file=train)
    assert (answer["ok"], answer["reason"]) == (False, "MODEL_INVALID")
    assert "took more than 0.2 s" in answer["message"]


def test_what_cannot_be_interrupted_ends_the_process() -> None:
    code = (
        "from formats.prompts import render_time\n"
        "render_time.RENDER_S_MAX = 0.1\n"
        "with render_time.bounded_rendering():\n"
        "    sum(range(10**12))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False)
    assert ended.returncode == -signal.SIGPROF


def test_a_tokenizer_that_loses_text_is_refused_before_rows_are_read(model_directory: Path, tmp_path: Path) -> None:
    """As an import would refuse it, and a model that was imported before imports looked."""
    base = tmp_path / "base"
    shutil.copytree(model_directory, base)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    answer = ask(base_model={"directory": str(base)}, train_file=write(tmp_path / "train.jsonl", ROWS))
    assert (answer["ok"], answer["reason"]) == (False, "MODEL_INVALID")
    assert "base model's tokenizer.json does not give a text back" in answer["message"]
