"""Asks the node's serving engine for scores and answers of an exported model. Not pure: subprocess.

The engine is a library of another service. So a program that the operator names runs as a process of its own and speaks
JSON.

It gets one request on standard input,
  {"base_model": DIR, "export": DIR, "kind": "adapter" or "full", "rank": R, "rows": [[id, ...], ...],
   "questions": [{"ids": [id, ...], "tokens_max": N}, ...]}
and answers on the last line of standard output with one of
  {"log_probs": [[null, x, ...], ...],    for every token of every row its log-probability after the tokens before it;
                                          null for the first one and where the engine has none
   "answers": [{"ids": [id, ...], "stopped": true}, ...]}
                                          a greedy answer to each question as a caller would get it, at most N tokens
                                          with the one that ended it; not stopped when it was cut at N
  {"refused": "why"}                      it does not take this kind of model

The files of kind "full" are float32, and it computes in float32; an adapter is scored in the type in which its base is
served. `services.inference.engines.score` is such a program. This module knows no engine and no tolerance.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.trainer.train.export.greedy_answers import Answer, Question
from services.trainer.train.settings.failures import Failure, platform_failure
from services.trainer.train.settings.spec import LoraTraining, Spec

SECONDS_MAX = 900.0
LAST_WORDS_CHARS = 400


@dataclass(frozen=True, kw_only=True)
class EngineSays:
    """`log_probs` by row and position, None where there is none; `answers` one to each question."""

    log_probs: list[list[float | None]]
    answers: list[Answer]


def ask_engine(spec: Spec, export: Path, rows: list[list[int]], questions: Sequence[Question]) -> EngineSays | str:
    """What the engine says, or why it refuses. Raises Failure(platform) when the program fails: that says nothing about
    the model, and another node may do better."""
    request = {
        "base_model": spec.base_model.directory,
        "export": str(export),
        "kind": "adapter" if isinstance(spec.training, LoraTraining) else "full",
        "rank": spec.training.r if isinstance(spec.training, LoraTraining) else 0,
        "rows": rows,
        "questions": [{"ids": question.ids, "tokens_max": question.tokens_max} for question in questions],
    }
    try:
        # In our process group: it dies with us.
        done = subprocess.run(
            spec.parity_command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(f"{error}") from error
    if done.returncode:
        raise _failed(f"exit code {done.returncode}: {done.stderr[-LAST_WORDS_CHARS:]}")
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        if "refused" in answer:
            return str(answer["refused"])
        log_probs = [[None if value is None else float(value) for value in row] for row in answer["log_probs"]]
        answers = [
            Answer(ids=[int(token_id) for token_id in each["ids"]], stopped=bool(each["stopped"]))
            for each in answer["answers"]
        ]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise _failed(f"its answer cannot be read: {error!r}") from error
    if [len(row) for row in log_probs] != [len(row) for row in rows]:
        raise _failed("it did not answer for every token")
    if len(answers) != len(questions):
        raise _failed(f"it answered {len(answers)} of {len(questions)} questions")
    return EngineSays(log_probs=log_probs, answers=answers)


def _failed(why: str) -> Failure:
    return platform_failure("TRAINING_FAILED", f"the scoring program of this node failed: {why}")
