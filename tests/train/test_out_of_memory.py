"""When memory runs out in a step the micro-batches are halved, the same rows are learnt from, and it is said; the run goes on to
the losses that it would have had.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.trainer.train.batches import MicroBatch
from services.trainer.train.failures import Failure
from services.trainer.train.loop import train
from services.trainer.train.objective import Supervised
from services.trainer.train.spec import load_spec, resolve_paths

Events = list[dict[str, Any]]
SETTINGS: dict[str, Any] = {"micro_batch_tokens": 512, "training": {"type": "lora", "r": 4, "dropout": 0.1}}


def run(workdir: Path) -> Events:
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, **fields: events.append({"type": kind, **fields}), lambda: False)
    return events


def losses(events: Events) -> dict[int, float]:
    return {step["step"]: step["loss"] for event in events if event["type"] == "progress" for step in event["steps"]}


def ranges(events: Events) -> list[tuple[int, int, int]]:
    return [(e["start_step"], e["end_step"], e["train_tokens"]) for e in events if e["type"] == "progress"]


def give_room(monkeypatch: pytest.MonkeyPatch, tokens_max: int, first_pass: int = 0) -> None:
    """From a training pass on, no larger micro-batch fits; it fails in its middle, when some gradients are there already."""
    whole, passes = Supervised.loss_sum, 0

    def loss_sum(self: Supervised, model: Any, batch: MicroBatch) -> Any:
        nonlocal passes
        if not torch.is_grad_enabled():
            return whole(self, model, batch)
        passes += 1
        if passes > first_pass and batch.input_ids.numel() > tokens_max:
            raise torch.OutOfMemoryError("out of memory, for a test")
        return whole(self, model, batch)

    monkeypatch.setattr(Supervised, "loss_sum", loss_sum)


def test_the_step_is_done_again_in_halves_and_the_run_goes_on(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"training": {"type": "lora", "r": 4, "dropout": 0.0}}
    expected = run(make_job("roomy", **settings))
    with monkeypatch.context() as patch:
        give_room(patch, 260, first_pass=3)
        events = run(make_job("tight", **settings))
    (told,) = [event for event in events if event["type"] == "warning"]
    assert told["code"] == "OUT_OF_MEMORY_RETRIED"
    assert "256 tokens from here on instead of 512" in told["message"]
    assert losses(events) == pytest.approx(losses(expected), abs=1e-4)
    assert ranges(events) == ranges(expected)


def test_what_was_halved_stays_halved_after_a_resume(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose draws are those of the step that was done again."""
    with monkeypatch.context() as patch:
        give_room(patch, 260)
        whole = run(make_job("tight", keep_last=20, **SETTINGS))
    middle = make_job("tight") / "checkpoints" / "step-00000006"
    assert json.loads((middle / "state.json").read_text())["position"]["micro_batch_tokens"] == 256
    onward = run(make_job("on", resume_from=str(middle), **SETTINGS))
    assert [event for event in onward if event["type"] == "warning"] == []
    assert losses(onward) == {step: loss for step, loss in losses(whole).items() if step > 6}


def test_single_rows_that_do_not_fit_end_the_run_with_the_reason(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_room(monkeypatch, 10)
    with pytest.raises(Failure) as failed:
        run(make_job("job", **SETTINGS))
    assert (failed.value.kind, failed.value.reason, failed.value.step) == ("platform", "JOB_TOO_LARGE", 0)
    assert "micro-batches of one row" in failed.value.message
