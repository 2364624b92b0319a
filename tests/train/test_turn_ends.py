"""What ends a trained turn ends a served one, also where that is another token than the end of sequence.

A template of the form that Qwen 2.5's base models have: turns end with a token of their own, texts with eos.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.recipes.vocabulary import END_ID
from services.trainer.train.settings.failures import Failure
from tests.train.conftest import run_job, write_job, write_rows
from tests.train.plain_engine import plain_engine
from tests.train.test_families import SCORER

TURNS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|unknown|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ANSWERS = {"open?": "close", "read?": "write", "lock?": "key"}
# Enough for a tiny model to know them by heart.
LEARNS = {"full": {"epochs": 40, "learning_rate": 5e-3}, "lora": {"epochs": 60, "learning_rate": 2e-2}}


@pytest.fixture
def base(base_model: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(base_model("tiny-llama"), folder)
    (folder / "chat_template.jinja").write_text(TURNS)
    return folder


def job(workdir: Path, base: Path, kind: str, **changes: Any) -> Path:
    training = {"type": kind} if kind == "full" else {"type": "lora", "r": 8, "alpha": 32}
    settings = {"training": training, "validation_file": None, "evaluations": 0, "batch_size": 8, **LEARNS[kind]}
    made = write_job(workdir, base, **settings | changes)
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ANSWERS.items()]
    write_rows(workdir / "inputs" / "train.jsonl", [{"messages": messages} for messages in rows * 8])
    return made


def turn_end(base: Path) -> int:
    token_id = open_model_folder(base).tokenizer.token_to_id("<|unknown|>")
    assert token_id not in (None, END_ID)
    return token_id


def exported(events: list[dict[str, Any]]) -> dict[str, Any]:
    return next(event for event in events if event["type"] == "exported")


def listed(folder: Path) -> list[int]:
    ends: list[int] = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return ends


def test_the_export_lists_the_turn_s_end_behind_the_base_s_own_and_answers_end_there(
    base: Path, tmp_path: Path
) -> None:
    work = job(tmp_path / "job", base, "full", parity_command=plain_engine(tmp_path))
    event = exported(run_job(work))
    assert listed(work / "export") == [END_ID, turn_end(base)]
    assert event["lineage"]["answer_ends"] == sorted([END_ID, turn_end(base)])
    # The whole answers are `close` and its end, or as long.
    assert event["parity"]["answers"]["ended"] == event["parity"]["answers"]["answers"] == 2
    # What else the base says of generation stays.
    before, after = (json.loads((each / "generation_config.json").read_text()) for each in (base, work / "export"))
    assert {**before, "eos_token_id": None} == {**after, "eos_token_id": None}


def test_an_engine_that_knows_only_the_end_of_sequence_fails_the_gate(base: Path, tmp_path: Path) -> None:
    work = job(tmp_path / "job", base, "full", parity_command=plain_engine(tmp_path, ends=[END_ID]))
    with pytest.raises(Failure, match=r"the engine goes on behind token \d+, which ends a trained answer") as caught:
        run_job(work)
    assert (caught.value.kind, caught.value.reason) == ("platform", "PARITY_FAILED")
    assert "parity.engine" in caught.value.details


def test_an_adapter_served_by_vllm_stops_where_its_training_stopped(base: Path, tmp_path: Path) -> None:
    """One start of vLLM, by the gate; it earns that a stranger's chat ends instead of running to its limit."""
    work = job(tmp_path / "job", base, "lora", parity_command=SCORER)
    event = exported(run_job(work))
    assert listed(work / "export") == sorted([END_ID, turn_end(base)])
    answers = event["parity"]["answers"]
    assert answers["ended"] == answers["answers"] == 2
    # `close`, `key` or `write` and the end, nothing more.
    assert answers["tokens"] <= 2 * 4


@pytest.mark.families
def test_whole_weights_served_by_vllm_stop_where_their_training_stopped(base: Path, tmp_path: Path) -> None:
    answers = exported(run_job(job(tmp_path / "job", base, "full", parity_command=SCORER)))["parity"]["answers"]
    assert answers["ended"] == answers["answers"] == 2
    assert answers["tokens"] <= 2 * 4


def test_an_end_that_the_base_knows_adds_nothing(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    work = job(tmp_path / "job", base_model("tiny-llama"), "lora", epochs=1)
    run_job(work)
    assert not (work / "export" / "generation_config.json").exists()


def test_answers_without_an_end_are_told_of(base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_text(TURNS.replace("<|unknown|>", " ###"))
    events = run_job(job(tmp_path / "job", base, "lora", epochs=1))
    (warning,) = [event for event in events if event["type"] == "warning"]
    assert warning["code"] == "ANSWERS_WITHOUT_END"
    assert warning["message"].startswith("100% of the answers of the train file end with plain text")
    assert not (tmp_path / "job" / "export" / "generation_config.json").exists()
