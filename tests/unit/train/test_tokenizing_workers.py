"""Tokens, counts and errors are the same however many processes make them, and no process outlives its work."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from formats.prompts.model_folder import ModelFolder
from services.trainer.train.data.preparation.fingerprint import FOLDERS, preparation_version
from services.trainer.train.data.tokens import chunks, tokenized_file
from services.trainer.train.data.tokens import tokenizing_workers as workers
from services.trainer.train.data.tokens.chunks import Chunk, ChunkRules, chunks_of
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.data.tokens.tokenized_file import tokenize_file
from services.trainer.train.data.tokens.tokenizing_workers import WorkerLost, Workers
from services.trainer.train.settings.directories import Directories
from services.trainer.train.settings.failures import Failure

ROOT = Path(__file__).parents[3]


def chat(number: int) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"question {number}"},
        {"role": "assistant", "content": "word " * (number % 40 + 1)},
    ]
    return {"messages": turns * (number % 3 + 1)}


def pair(number: int) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": f"question {number}"}]},
        "preferred_output": [{"role": "assistant", "content": "yes " * (number % 7 + 1)}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
        "weight": number % 3,
    }


BROKEN = {"messages": [{"role": "user", "content": "nobody answers"}]}
FILES: dict[str, list[Any]] = {
    "conversations": [chat(number) for number in range(90)],
    "instructions": [{"prompt": f"p{n}", "completion": "c " * (n % 50 + 1)} for n in range(1, 90)],
    "texts": [{"text": f"text {n} " * (n % 9 + 1), "weight": 0.5} for n in range(90)],
    "preferences": [pair(number) for number in range(90)],
    "broken late": [
        *(chat(n) for n in range(70)),
        BROKEN,
        *(chat(n) for n in range(20)),
        {"prompt": "p", "completion": "c"},
    ],
    "broken first": [{"a": 1}, BROKEN, *(chat(n) for n in range(60))],
    "nothing sound": [{"a": 1}] * 40,
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized_file, "PARALLEL_BYTES_MIN", 0)
    monkeypatch.setattr(chunks, "CHUNK_LINES_MAX", 7)


def settings_for(count: int, **changes: Any) -> PrepareSettings:
    wanted: dict[str, Any] = {
        "max_seq_length": 48, "packing": True, "train_on_inputs": "auto", "template_date": "2024-07-26",
        "directories": Directories(workers=count),
    }  # fmt: skip
    return PrepareSettings(**{**wanted, **changes})


def told(path: Path, folder: ModelFolder, count: int, **changes: Any) -> dict[str, Any]:
    file = tokenize_file(path, "train", folder, settings_for(count, **changes))
    errors = [(error.line, error.path, error.expectation) for error in file.errors.kept]
    counted: dict[str, Any] = {
        "errors": errors,
        "count": file.errors.count,
        "format": file.format,
        "sha256": file.sha256,
    }
    if not file.errors.count:
        rows = file.rows
        counted |= {"digest": rows.digest(), "width": rows.rows_per_example, "features": asdict(file.features)}
        counted |= {"rows": (rows.rows, rows.count, rows.truncated_rows, rows.skipped_rows, rows.longest_row_tokens)}
    return counted


@pytest.mark.parametrize("name", FILES)
def test_any_number_of_workers_gives_the_same(name: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in FILES[name]))
    alone = told(path, model_folder, 1)
    assert told(path, model_folder, 2) == told(path, model_folder, 3) == alone
    assert bool(alone["errors"]) == (name in ("broken late", "broken first", "nothing sound"))
    assert alone["errors"] == sorted(alone["errors"], key=lambda error: error[0])
    assert told(path, model_folder, 2, errors_max=1)["errors"] == alone["errors"][:1]


def test_what_a_template_refuses_is_told_in_the_order_of_the_file(model_folder: ModelFolder, tmp_path: Path) -> None:
    """Rows with tools, of which this template knows nothing: they parse, and fail where tokens are made."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    rows = [{**chat(number), **({"tools": [tool]} if number in (20, 22, 60) else {})} for number in range(80)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = told(path, model_folder, 1)
    assert [line for line, _, _ in alone["errors"]] == [21, 23, 61]
    assert told(path, model_folder, 3) == alone


def test_what_no_row_can_be_trained_for_is_said_by_whoever_finds_it(model_folder: ModelFolder, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in FILES["texts"]))
    for count in (1, 2):
        with pytest.raises(Failure, match="rows of text do not tell inputs from outputs") as failed:
            tokenize_file(path, "train", model_folder, settings_for(count, train_on_inputs=False))
        assert failed.value.violations[0].field == "train_on_inputs"


def rules_of(folder: ModelFolder) -> ChunkRules:
    return settings_for(1).chunk_rules(folder)


def test_workers_end_with_their_context_and_one_that_is_killed_is_missed(model_folder: ModelFolder) -> None:
    chunk = Chunk(lines=((1, json.dumps(chat(1)).encode()),), expected="conversation")
    with Workers(2, rules_of(model_folder)) as pool:
        assert [result.sound for result in pool.results([chunk] * 5)] == [True] * 5
        processes = [psutil.Process(process.pid) for process in pool._processes]
        for process in processes:
            process.kill()
        with pytest.raises(WorkerLost):
            list(pool.results([chunk] * 5))
    assert not any(process.is_running() for process in processes)


_ORPHANING = """
import os, signal, sys, time
from pathlib import Path
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.data.tokens.tokenizing_workers import Workers
settings = PrepareSettings(max_seq_length=64, packing=True, train_on_inputs="auto", template_date="2024-07-26")
pool = Workers(2, settings.chunk_rules(open_model_folder(Path(sys.argv[1]))))
print(*(process.pid for process in pool._processes), flush=True)
time.sleep(60)
"""


def test_workers_end_when_the_process_they_work_for_is_killed(model_directory: Path) -> None:
    command = [sys.executable, "-c", _ORPHANING, str(model_directory)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        processes = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
        os.kill(parent.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert not alive


def test_chunks_are_bounded_in_lines_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES_MAX", 10)
    lines = [(number, b"x" * size) for number, size in enumerate([1, 2, 1, 9, 5, 5, 50, 1] + [0] * 9)]
    grouped = list(chunks_of(lines))
    assert [line for group in grouped for line in group] == lines
    assert [len(group) for group in grouped] == [4, 2, 1, 7, 3]


def test_a_message_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "message"
    path.write_bytes(workers._LENGTH.pack(10) + b"short")
    with path.open("rb") as stream, pytest.raises(EOFError):
        workers._receive(stream)


_LOADED = """
import sys
import services.trainer.train.data.preparation.prepare, formats.parquet
rooms = ("formats.", "services.trainer.train.")
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith(rooms)))
"""


def test_the_version_of_the_preparation_covers_all_code_that_it_loads() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {Path(file).relative_to(ROOT).parent.as_posix() for file in done.stdout.split()}
    # The package of data only says what it is.
    assert loaded - {"services/trainer/train/data"} == set(FOLDERS)
    assert len(preparation_version()) == 16


def test_a_worker_whose_template_has_no_end_names_the_template() -> None:
    ending = "import os, signal; os.kill(os.getpid(), signal.SIGPROF)"
    process = subprocess.Popen([sys.executable, "-c", ending], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process, pytest.raises(Failure, match="does not come to an end") as refused:
        workers._asked(process, Chunk(lines=(), expected=None, tokens=True))
    assert refused.value.reason == "MODEL_INVALID"
