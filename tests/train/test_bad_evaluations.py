"""An evaluation that comes out as no number, or far beyond a model that guesses, ends the run as a step does: typed,
with the step, and the last good checkpoint stays.
"""

import math
from typing import Any

import pytest

from services.trainer.train.disk.durable import read_whole_folder
from services.trainer.train.loop.run import train
from services.trainer.train.losses.objective import Preferences, Supervised
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import preferences, write_rows
from tests.train.test_bad_input import Events, Make


def poison(patch: pytest.MonkeyPatch, kind: type[Any], number: int, loss: float) -> None:
    """The evaluation `number`, counted from the look before the first step, comes out as `loss`."""
    whole, seen = kind.evaluation, 0

    def evaluation(self: Any, totals: Any) -> Any:
        nonlocal seen
        seen += 1
        return whole(self, [loss * totals[-1], *totals[1:]] if seen > number else totals)

    patch.setattr(kind, "evaluation", evaluation)


def failed(job: Any) -> tuple[Failure, Events]:
    events: Events = []
    spec = resolve_paths(load_spec(job / "spec.json"), job)
    with pytest.raises(Failure) as caught:
        train(spec, job, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    return caught.value, events


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e4], ids=["nan", "infinite", "exploding"])
def test_an_evaluation_that_diverges_ends_the_run_at_its_step(
    make_job: Make, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    job = make_job(early_stopping={"patience": 2, "min_delta": 0, "warmup_evaluations": 0})
    poison(monkeypatch, Supervised, 2, loss)
    failure, events = failed(job)
    assert (failure.kind, failure.reason, failure.step) == ("user", "TRAINING_INPUT_INVALID", 6)
    assert "evaluation 2 after step 6" in failure.message
    assert "checkpoint is at step 4" in failure.message
    assert failure.last_checkpoint_step == 4
    kept = [read_whole_folder(path)["step"] for path in sorted((job / "checkpoints").iterdir())]
    assert kept == [2, 4]
    # What was trained is owed; the evaluation that says nothing is not.
    assert max(event["end_step"] for event in events if event["type"] == "progress") == 6
    assert [event["evaluation"] for event in events if event["type"] == "evaluation"] == [0, 1]
    assert not (job / "export").exists()


def test_a_base_that_cannot_score_the_validation_file_is_told_before_the_first_step(
    make_job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, Supervised, 0, math.nan)
    failure, events = failed(make_job())
    assert (failure.kind, failure.reason, failure.step) == ("user", "TRAINING_INPUT_INVALID", 0)
    assert "before the first step" in failure.message
    assert "there is no checkpoint yet" in failure.message
    assert [event["type"] for event in events] == ["started"]


def test_an_evaluation_of_preferences_has_a_bound_of_its_own(make_job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(method="dpo")
    write_rows(job / "inputs" / "train.jsonl", preferences(8))
    write_rows(job / "inputs" / "held.jsonl", preferences(4, start=50))
    poison(monkeypatch, Preferences, 1, 1e4)
    failure, _ = failed(job)
    assert (failure.kind, failure.reason) == ("user", "TRAINING_INPUT_INVALID")
    assert "evaluation 1 after step 1" in failure.message
