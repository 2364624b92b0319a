"""The learning rate that stands for zero learns, whichever method and weights: the loss of held-out rows falls from one
evaluation to the next."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import preferences, run_job, write_rows
from tests.train.test_kto import judged

ROWS, HELD = 24, 6
WRITERS: dict[str, Callable[..., list[dict[str, Any]]]] = {"dpo": preferences, "kto": judged}
# Nats that 24 steps take off the loss of held-out rows: of a word, of a pair of answers, of a judged answer. An adapter
# at the rate of all weights takes off a tenth of it.
LEARNED = {
    ("sft", "lora"): 0.2, ("sft", "full"): 0.1,
    ("dpo", "lora"): 5e-3, ("dpo", "full"): 2e-3,
    ("kto", "lora"): 5e-4, ("kto", "full"): 2e-4,
}  # fmt: skip


@pytest.mark.parametrize(("method", "weights"), LEARNED)
def test_what_is_taken_for_zero_learns(make_job: Callable[..., Path], method: str, weights: str) -> None:
    workdir = make_job(method=method, training={"type": weights}, epochs=4, evaluations=1, warmup_ratio=0.0)
    if method in WRITERS:
        write_rows(workdir / "inputs" / "train.jsonl", WRITERS[method](ROWS))
        write_rows(workdir / "inputs" / "held.jsonl", WRITERS[method](HELD, start=1000))
    path = workdir / "spec.json"
    spec = json.loads(path.read_text())
    del spec["learning_rate"]
    path.write_text(json.dumps(spec))
    evaluations = [event for event in run_job(workdir) if event["type"] == "evaluation"]
    losses = [event["loss"] for event in evaluations]
    assert all(later < earlier for earlier, later in pairwise(losses)), losses
    assert losses[0] - losses[-1] > LEARNED[method, weights], losses
    if method in WRITERS:
        assert evaluations[-1]["reward_accuracy"] == 1.0
