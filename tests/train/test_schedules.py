"""The learning rate of every step: against formulas written out here, against transformers' own schedules, and as a run
uses it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from formats.learning_rates import LearningRateSchedule, learning_rate_at
from services.trainer.train.loop.run import train
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec

PEAK = 0.2


def schedule(kind: Any, floor: float = 0.0, cycles: float = 0.5) -> LearningRateSchedule:
    return LearningRateSchedule(type=kind, min_lr_ratio=floor, num_cycles=cycles)


# schedule, warm-up, steps -> the rate of each step as a share of the peak
WRITTEN_OUT: dict[str, tuple[LearningRateSchedule, float, list[float]]] = {
    "a line": (schedule("linear"), 0.0, [1, 3 / 4, 2 / 4, 1 / 4]),
    "a line down to a floor": (schedule("linear", 0.2), 0.0, [1, 0.2 + 0.8 * 3 / 4, 0.2 + 0.8 / 2, 0.2 + 0.8 / 4]),
    "a line after a warm-up": (schedule("linear"), 0.5, [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
    # 0.3 of 5 steps are 1.5, and a step that has begun counts: 2.
    "a warm-up of a part of a step": (schedule("linear"), 0.3, [0, 1 / 2, 1, 2 / 3, 1 / 3]),
    "half a wave": (schedule("cosine"), 0.0, [1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2]),
    "half a wave above a floor": (
        schedule("cosine", 0.1), 0.0,
        [1, 0.1 + 0.9 * (0.5 + math.sqrt(0.5) / 2), 0.1 + 0.9 * 0.5, 0.1 + 0.9 * (0.5 - math.sqrt(0.5) / 2)],
    ),
    "half a wave after a warm-up": (
        schedule("cosine"), 1 / 3, [0, 1 / 2, 1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2],
    ),
    "a whole wave": (schedule("cosine", cycles=1.0), 0.0, [1, 0.5, 0, 0.5]),
    "a wave and a half": (schedule("cosine", cycles=1.5), 0.0, [1, 0.5, 0, 0.5, 1, 0.5]),
    "a quarter of a wave": (schedule("cosine", cycles=0.25), 0.0, [1, 0.5 + math.sqrt(0.5) / 2]),
    "waves above a floor": (schedule("cosine", 0.5, 1.0), 0.0, [1, 0.75, 0.5, 0.75]),
    "a floor of one": (schedule("cosine", 1.0), 0.0, [1, 1, 1]),
    # The last step never warms up.
    "a warm-up to the end": (schedule("cosine"), 1.0, [0, 1 / 3, 2 / 3, 1]),
    "a single step": (schedule("cosine"), 0.0, [1]),
    "a single step that was to warm up": (schedule("linear"), 0.01, [1]),
    "two steps of which one warms up": (schedule("linear"), 0.05, [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_the_rate_of_every_step(name: str) -> None:
    settings, warmup, shares = WRITTEN_OUT[name]
    found = [learning_rate_at(step, len(shares), PEAK, warmup, settings) for step in range(len(shares))]
    assert found == pytest.approx([PEAK * share for share in shares], abs=1e-12)


THEIRS: dict[str, tuple[LearningRateSchedule, Callable[..., Any], dict[str, Any]]] = {
    "linear": (schedule("linear"), get_linear_schedule_with_warmup, {}),
    "cosine": (schedule("cosine"), get_cosine_schedule_with_warmup, {}),
    "waves": (schedule("cosine", cycles=2.5), get_cosine_schedule_with_warmup, {"num_cycles": 2.5}),
    "floor": (schedule("cosine", 0.1), get_cosine_with_min_lr_schedule_with_warmup, {"min_lr_rate": 0.1}),
    "waves above a floor": (
        schedule("cosine", 0.3, 1.5), get_cosine_with_min_lr_schedule_with_warmup,
        {"min_lr_rate": 0.3, "num_cycles": 1.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_the_schedule_is_that_of_transformers(name: str) -> None:
    settings, make, more = THEIRS[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    theirs = make(optimizer, 5, 50, **more)
    for step in range(50):
        assert learning_rate_at(step, 50, PEAK, 0.1, settings) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_run_takes_the_rate_of_its_schedule_at_every_step(make_job: Callable[..., Path]) -> None:
    workdir = make_job(
        epochs=1, evaluations=0, learning_rate=1e-3, warmup_ratio=0.3,
        schedule={"type": "cosine", "min_lr_ratio": 0.25, "num_cycles": 1.0},
    )  # fmt: skip
    rates: list[float] = []

    def hear(kind: str, /, **fields: Any) -> None:
        if kind == "progress":
            rates.extend(step["learning_rate"] for step in fields["steps"])

    train(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, hear, lambda: False)
    # 6 steps, of which 2 warm up; then one wave over 4 between the peak and a quarter of it.
    assert rates == pytest.approx([1e-3 * share for share in (0, 0.5, 1, 0.625, 0.25, 0.625)], abs=1e-12)
