"""The node's scoring program is another process that may say anything: its numbers, its refusal and its failures are
told apart."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from services.trainer.train.export.engine_scorer import EngineSays, ask_engine
from services.trainer.train.export.greedy_answers import Answer, Question
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import Spec
from services.trainer.train.settings.spec_json import parse_spec

ROWS = [[5, 6, 7], [8, 9]]
QUESTIONS = [Question(row=4, ids=[5, 6], tokens_max=9)]


def spec_with(tmp_path: Path, program: str) -> Spec:
    path = tmp_path / "scorer.py"
    path.write_text("import json, sys\nrequest = json.load(sys.stdin)\n" + program)
    spec = parse_spec({"job_id": "ft-1", "base_model": {"directory": "/base"}, "train_file": "train.jsonl"})
    return replace(spec, parity_command=(sys.executable, str(path)))


def test_it_hears_all_it_needs_and_its_last_line_counts(tmp_path: Path) -> None:
    spec = spec_with(
        tmp_path,
        f"open({str(tmp_path / 'heard.json')!r}, 'w').write(json.dumps(request))\n"
        "print('loading')\n"
        "log_probs = [[None, *[-1.5] * (len(row) - 1)] for row in request['rows']]\n"
        "print(json.dumps({'log_probs': log_probs, 'answers': [{'ids': [7, 2], 'stopped': True}]}))\n",
    )
    assert ask_engine(spec, Path("/export"), ROWS, QUESTIONS) == EngineSays(
        log_probs=[[None, -1.5, -1.5], [None, -1.5]], answers=[Answer(ids=[7, 2], stopped=True)]
    )
    assert json.loads((tmp_path / "heard.json").read_text()) == {
        "base_model": "/base",
        "export": "/export",
        "kind": "adapter",
        "rank": 16,
        "rows": ROWS,
        "questions": [{"ids": [5, 6], "tokens_max": 9}],
    }


def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    spec = spec_with(tmp_path, "print(json.dumps({'refused': 'serves no adapters'}))")
    assert ask_engine(spec, Path("/export"), ROWS, QUESTIONS) == "serves no adapters"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("sys.exit('no memory')", "exit code 1: no memory"),
        ("pass", "cannot be read"),
        ("print('hello')", "cannot be read"),
        ("print(json.dumps({'log_probs': [['x']]}))", "cannot be read"),
        ("print(json.dumps({'log_probs': [[None, -1.0, -1.0]], 'answers': []}))", "every token"),
        ("print(json.dumps({'log_probs': [[None, -1.0], [None, -1.0]], 'answers': []}))", "every token"),
        ("print(json.dumps({'log_probs': [[None, -1.0, -1.0], [None, -1.0]]}))", "cannot be read"),
        ("print(json.dumps({'log_probs': [[None, -1, -1], [None, -1]], 'answers': []}))", "0 of 1 questions"),
        ("print(json.dumps({'log_probs': [[None, -1, -1], [None, -1]], 'answers': [{'ids': [1]}]}))", "cannot be read"),
    ],
)
def test_a_program_that_fails_is_ours_and_may_pass(tmp_path: Path, program: str, words: str) -> None:
    with pytest.raises(Failure, match=words) as caught:
        ask_engine(spec_with(tmp_path, program), Path("/export"), ROWS, QUESTIONS)
    assert (caught.value.kind, caught.value.reason) == ("platform", "TRAINING_FAILED")


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    spec = replace(spec_with(tmp_path, ""), parity_command=(str(tmp_path / "nowhere"),))
    with pytest.raises(Failure, match="nowhere"):
        ask_engine(spec, Path("/export"), ROWS, QUESTIONS)
