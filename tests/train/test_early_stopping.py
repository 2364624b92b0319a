"""Early stopping: when it ends a run, what ships then, and that a killed run comes to the very same end."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from services.trainer.train.checkpoint.position import Position
from services.trainer.train.loop.early_stopping import judge
from services.trainer.train.settings.methods import EarlyStopping
from tests.train.conftest import run_job

Events = list[dict[str, Any]]
# The same few rows again and again at a high rate: the held-out loss falls and then rises.
HOT = {
    "epochs": 6,
    "evaluations": 2,
    "learning_rate": 3e-2,
    "warmup_ratio": 0.0,
    "schedule": {"type": "linear", "min_lr_ratio": 1.0},
    "early_stopping": {"patience": 2, "warmup_evaluations": 0},
}


def of_type(events: Events, kind: str) -> Events:
    return [event for event in events if event["type"] == kind]


def judged(
    stopping: EarlyStopping, losses: list[float], steps: list[int] | None = None, total_steps: int = 100
) -> list[Position]:
    position, found = Position(), []
    for number, (loss, step) in enumerate(zip(losses, steps or range(1, len(losses) + 1), strict=True), 1):
        position = judge(Position(**{**vars(position), "step": step}), stopping, number, loss, total_steps=total_steps)
        found.append(position)
    return found


@pytest.mark.parametrize(
    ("stopping", "losses", "stops_at", "best_step"),
    [
        ((2, 0.0, 0), [3.0, 2.0, 2.5, 2.4], 4, 2),
        ((2, 0.0, 0), [3.0, 2.0, 2.5, 1.9, 2.0, 2.0], 6, 4),
        ((1, 0.0, 0), [3.0, 3.0], 2, 1),
        # The first two count nothing, and still one of them may be the best.
        ((1, 0.0, 2), [1.0, 2.0, 2.0], 3, 1),
        ((2, 0.0, 1), [3.0, 4.0, 5.0], 3, 1),
        # Gains below min_delta do not count, but the best of them ships.
        ((2, 0.5, 0), [3.0, 2.9, 2.8], 3, 3),
        ((2, 0.0, 0), [3.0, 2.0, 1.0], None, 3),
    ],
)
def test_when_a_run_ends(
    stopping: tuple[int, float, int], losses: list[float], stops_at: int | None, best_step: int
) -> None:
    patience, min_delta, warmup = stopping
    rule = EarlyStopping(patience=patience, min_delta=min_delta, warmup_evaluations=warmup)
    positions = judged(rule, losses)
    stopped = [position.step for position in positions if position.stopped_early]
    assert stopped[:1] == ([] if stops_at is None else [stops_at])
    assert positions[-1].best_step == best_step
    assert positions[-1].best_loss == min(losses)


def test_a_second_evaluation_of_the_same_weights_is_no_evaluation_without_gain() -> None:
    """An epoch with fewer steps than evaluations has several on one step."""
    rule = EarlyStopping(patience=2, min_delta=0.0, warmup_evaluations=0)
    positions = judged(rule, [3.0, 3.0, 3.0, 3.5, 3.5, 4.0], steps=[1, 1, 1, 2, 2, 3])
    assert [position.evaluations_without_gain for position in positions] == [0, 0, 0, 1, 1, 2]
    assert [position.stopped_early for position in positions] == [False] * 5 + [True]
    assert positions[-1].best_step == 1


def test_a_patience_that_ends_with_the_last_step_ends_nothing_early() -> None:
    rule = EarlyStopping(patience=2, min_delta=0.0, warmup_evaluations=0)
    losses = [3.0, 3.0, 3.5]
    assert [position.stopped_early for position in judged(rule, losses, total_steps=4)] == [False, False, True]
    assert [position.stopped_early for position in judged(rule, losses, total_steps=3)] == [False] * 3


def test_a_run_that_did_all_its_steps_is_a_completed_one(make_job: Callable[..., Path]) -> None:
    """No evaluation can be better by so much, so that the patience ends with the third one, which is the last."""
    stopping = {"patience": 2, "warmup_evaluations": 0, "min_delta": 100.0}
    events = run_job(make_job(epochs=1, evaluations=3, early_stopping=stopping))
    (finished,) = of_type(events, "finished")
    assert (finished["stopped_early"], finished["step"]) == (False, finished["total_steps"])
    assert not any(event["stopped_early"] for event in of_type(events, "evaluation")[1:])
    (lineage,) = (event["lineage"] for event in of_type(events, "exported"))
    assert not lineage["stopped_early"]
    assert of_type(events, "checkpoint")[-1]["step"] == finished["total_steps"]


@pytest.mark.parametrize("training", [{"type": "lora", "r": 4, "dropout": 0.1}, {"type": "full"}], ids=["lora", "full"])
def test_the_best_evaluation_ships_and_nothing_after_the_end_is_done(
    make_job: Callable[..., Path], training: dict[str, Any]
) -> None:
    workdir = make_job("stopped", training=training, **HOT)
    events = run_job(workdir)
    (finished,) = of_type(events, "finished")
    evaluations = of_type(events, "evaluation")[1:]
    losses = [event["loss"] for event in evaluations]
    best = losses.index(min(losses))
    assert finished["stopped_early"]
    assert finished["step"] == evaluations[-1]["step"] < finished["total_steps"]
    assert (finished["best_step"], finished["best_loss"]) == (evaluations[best]["step"], losses[best])
    assert len(losses) == best + 3
    assert evaluations[-1]["stopped_early"]
    assert not any(event["stopped_early"] for event in evaluations[:-1])
    # All of it is metered in ranges of the plan, up to where it ended.
    ranges = [(event["start_step"], event["end_step"]) for event in of_type(events, "progress")]
    assert not any(event["partial"] for event in of_type(events, "progress"))
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == finished["step"]
    assert of_type(events, "checkpoint")[-1]["step"] == finished["step"]
    lineage = of_type(events, "exported")[0]["lineage"]
    assert (lineage["stopped_early"], lineage["best_step"]) == (True, finished["best_step"])
    # The export is what a run that ended at the best evaluation would have had in its hands then.
    name = "adapter_model.safetensors" if training["type"] == "lora" else "model.safetensors"
    until = make_job("until", training=training, checkpoint_every_steps=1, keep_last=100, **HOT)
    run_job(until)
    then = load_file(until / "checkpoints" / f"step-{finished['best_step']:08d}" / name)
    shipped = load_file(workdir / "export" / name)
    assert shipped
    assert all(bool((then[key] == tensor).all()) for key, tensor in shipped.items())


@pytest.mark.parametrize("training", [{"type": "lora", "r": 4, "dropout": 0.1}, {"type": "full"}], ids=["lora", "full"])
def test_a_killed_run_comes_to_the_same_end(make_job: Callable[..., Path], training: dict[str, Any]) -> None:
    """Stopped before any evaluation, at the best one, behind it, and where it would have ended anyway."""
    settings = {**HOT, "training": training, "checkpoint_every_steps": 1}
    whole = run_job(make_job("whole", **settings))
    (expected,) = of_type(whole, "finished")
    revision = of_type(whole, "exported")[0]["revision"]
    for stop_after in sorted({2, expected["best_step"], expected["best_step"] + 2, expected["step"]}):
        halves = make_job(f"halves-{stop_after}", **settings)
        run_job(halves, stop_after=stop_after)
        elsewhere = make_job(f"elsewhere-{stop_after}", **settings)
        newest = max((halves / "checkpoints").glob("step-*"))
        assert newest.name == f"step-{stop_after:08d}"
        shutil.copytree(newest, elsewhere / "checkpoints" / newest.name)
        rest = run_job(elsewhere)
        (finished,) = of_type(rest, "finished")
        assert of_type(rest, "exported")[0]["revision"] == revision
        for name in ("step", "stopped_early", "best_step", "best_loss", "train_tokens", "validation_tokens"):
            assert finished[name] == expected[name], name


def test_a_run_that_never_stops_ships_its_best_evaluation_too(make_job: Callable[..., Path]) -> None:
    gently = {"learning_rate": 1e-3, "early_stopping": {"patience": 5, "warmup_evaluations": 6}}
    events = run_job(make_job(**{**HOT, **gently}))
    (finished,) = of_type(events, "finished")
    assert not finished["stopped_early"]
    assert finished["step"] == finished["total_steps"]
    losses = {event["step"]: event["loss"] for event in of_type(events, "evaluation")[1:]}
    assert finished["best_loss"] == min(losses.values()) == losses[finished["best_step"]]
