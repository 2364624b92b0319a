"""When memory runs out in a step or in an evaluation the micro-batches are halved, the same rows are looked at again,
and it is said; the run goes on to the losses that it would have had. Also when one process of several runs out in the
middle of a pass, while the others wait for its part of the weights.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from services.trainer.train.checkpoint import random_states
from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.loop import prefetch as ahead
from services.trainer.train.loop import reference
from services.trainer.train.loop import start_run as start
from services.trainer.train.loop.run import train
from services.trainer.train.losses import objective
from services.trainer.train.losses.objective import Supervised
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import held_port, preferences, write_rows

Events = list[dict[str, Any]]
SETTINGS: dict[str, Any] = {"micro_batch_tokens": 512, "training": {"type": "lora", "r": 4, "dropout": 0.1}}


def run(workdir: Path) -> Events:
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    return events


def losses(events: Events) -> dict[int, float]:
    return {step["step"]: step["loss"] for event in events if event["type"] == "progress" for step in event["steps"]}


def ranges(events: Events) -> list[tuple[int, int, int]]:
    return [(e["start_step"], e["end_step"], e["train_tokens"]) for e in events if e["type"] == "progress"]


def give_room(monkeypatch: pytest.MonkeyPatch, tokens_max: int, first_pass: int = 0) -> None:
    """From a training pass on, no larger micro-batch fits; it fails in its middle, when some gradients are there
    already."""
    whole, passes = Supervised.loss_sum, 0

    def loss_sum(self: Supervised, model: Any, batch: MicroBatch, *scale: float) -> Any:
        nonlocal passes
        if not torch.is_grad_enabled():
            return whole(self, model, batch)
        passes += 1
        if passes > first_pass and batch.input_ids.numel() > tokens_max:
            raise torch.OutOfMemoryError("out of memory, for a test")
        return whole(self, model, batch, *scale)

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


def test_the_step_that_is_done_again_draws_what_it_drew_before_on_a_gpu_too(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout on a GPU draws from that device's own generator, which a list of states stands for here."""
    drawn = [0, 0]

    def restore(state: torch.Tensor, device: int) -> None:
        drawn[device] = int(state)

    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: len(drawn),
        get_rng_state_all=lambda: [torch.tensor([number]) for number in drawn],
        set_rng_state=restore,
    )
    with_cuda = SimpleNamespace(get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state, cuda=cuda)
    monkeypatch.setattr(random_states, "torch", with_cuda)
    seen: list[list[int]] = []
    give_room(monkeypatch, 260, first_pass=3)
    whole = Supervised.loss_sum

    def loss_sum(self: Supervised, model: Any, batch: MicroBatch, *scale: float) -> Any:
        if torch.is_grad_enabled():
            seen.append([*drawn])
            drawn[1] += 1
        return whole(self, model, batch, *scale)

    monkeypatch.setattr(Supervised, "loss_sum", loss_sum)
    events = run(make_job("job", **SETTINGS, epochs=1))
    assert [event["code"] for event in events if event["type"] == "warning"] == ["OUT_OF_MEMORY_RETRIED"]
    again = [before for before, after in itertools.pairwise(seen) if after <= before]
    assert len(again) == 1
    assert seen.count([0, 0]) == 1


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


def test_rows_laid_ahead_that_find_no_room_are_laid_again_in_the_step(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a step is at its peak the copy of the next one's rows may find none; when its own turn comes there is
    room."""
    expected = run(make_job("roomy", **SETTINGS))
    whole = vars(ahead)["batches_of_step"]

    def beside(*arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise torch.OutOfMemoryError("out of memory, for a test")
        return whole(*arguments)

    monkeypatch.setattr(ahead, "batches_of_step", beside)
    events = run(make_job("tight", **SETTINGS))
    assert [event for event in events if event["type"] == "warning"] == []
    assert losses(events) == losses(expected)


def test_rows_that_find_no_room_halve_micro_batches_as_a_step_does(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, which is drawn as if there had been room for these micro-batches only."""
    expected = run(make_job("halves", **{**SETTINGS, "micro_batch_tokens": 256}))
    whole = vars(ahead)["batches_of_step"]

    def lay(inputs: Any, step: int, group: Any, tokens_max: int) -> Any:
        if tokens_max > 256:
            raise torch.OutOfMemoryError("out of memory, for a test")
        return whole(inputs, step, group, tokens_max)

    monkeypatch.setattr(ahead, "batches_of_step", lay)
    events = run(make_job("tight", **{**SETTINGS, "evaluations": 0}))
    assert [event["code"] for event in events if event["type"] == "warning"] == ["OUT_OF_MEMORY_RETRIED"]
    assert losses(events) == losses(expected)


def no_room(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory, for a test")


def test_rows_that_never_find_room_end_the_run_with_the_reason(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "batches_of_step", no_room)
    with pytest.raises(Failure) as failed:
        run(make_job("job", **SETTINGS))
    assert (failed.value.kind, failed.value.reason, failed.value.step) == ("platform", "JOB_TOO_LARGE", 0)


def looks(events: Events) -> list[float]:
    return [event["loss"] for event in events if event["type"] == "evaluation"]


def test_an_evaluation_is_done_again_in_halves_and_stays_halved(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its micro-batches are its own: those of the steps stay as they are."""
    expected = run(make_job("roomy", **SETTINGS))
    whole = Supervised.sums

    def sums(self: Supervised, model: Any, batch: MicroBatch) -> Any:
        if batch.input_ids.numel() > 260:
            raise torch.OutOfMemoryError("out of memory, for a test")
        return whole(self, model, batch)

    monkeypatch.setattr(Supervised, "sums", sums)
    events = run(make_job("tight", keep_last=20, **SETTINGS))
    (told,) = [event for event in events if event["type"] == "warning"]
    assert told["code"] == "OUT_OF_MEMORY_RETRIED"
    assert "before the first step" in told["message"]
    assert "256 tokens from here on instead of 512" in told["message"]
    assert looks(events) == pytest.approx(looks(expected), abs=1e-5)
    # Steps do not depend on who looks: dropout is drawn as before.
    assert losses(events) == losses(expected)
    middle = make_job("tight") / "checkpoints" / "step-00000006"
    onward = run(make_job("on", resume_from=str(middle), **SETTINGS))
    assert [event for event in onward if event["type"] == "warning"] == []
    assert looks(onward) == looks(events)[-len(looks(onward)) :]


def test_an_evaluation_of_single_rows_that_does_not_fit_ends_the_run(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Supervised, "sums", no_room)
    with pytest.raises(Failure) as failed:
        run(make_job("job", **SETTINGS))
    assert (failed.value.kind, failed.value.reason, failed.value.step) == ("platform", "JOB_TOO_LARGE", 0)


@pytest.mark.parametrize("started", [False, True], ids=["adapter-off", "stored"])
def test_the_reference_of_preferences_may_run_out_of_memory_too(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    """With dropout: after a failed look at the reference, which has none, the steps must draw theirs as before."""
    settings = {**SETTINGS, "method": "dpo", "evaluations": 0, "validation_file": None}
    if started:
        run(first := make_job("first", **SETTINGS))
        settings["start_from"] = {
            "directory": str(first / "export"),
            "tuning_job": "ft-0",
            "step": 1,
            "sha256": "a" * 64,
        }

    def job(name: str, **more: Any) -> Path:
        write_rows((workdir := make_job(name, **{**settings, **more})) / "inputs" / "train.jsonl", preferences(16))
        return workdir

    # Scores that are stored before the first step leave the steps their size.
    expected = losses(run(job("expected", micro_batch_tokens=512 if started else 256)))
    module = reference if started else objective
    whole, seen = module.answer_log_probs, 0

    def scores(model: Any, batch: MicroBatch) -> Any:
        nonlocal seen
        if not torch.is_grad_enabled() and batch.input_ids.numel() > 260:
            seen += 1
            raise torch.OutOfMemoryError("out of memory, for a test")
        return whole(model, batch)

    monkeypatch.setattr(module, "answer_log_probs", scores)
    events = run(job("tight"))
    assert seen
    assert {event["code"] for event in events if event["type"] == "warning"} == {"OUT_OF_MEMORY_RETRIED"}
    found = losses(events)
    # The order of sums in a reference is that of its micro-batches.
    assert found == (pytest.approx(expected, abs=1e-4) if started else expected)


def run_apart(workdir: Path, faults: str) -> Events:
    """Two processes on gloo, without a launcher around them."""
    with held_port() as port:
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.train.tight_worker", str(workdir)],
                stdout=subprocess.PIPE,
                stderr=(workdir / f"stderr-{rank}").open("w"),
                text=True,
                cwd=Path(__file__).parents[2],
                env={
                    **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
                    "FINEMESH_TEST_FULL_AT": faults,
                },
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            told = [child.communicate(timeout=240)[0] for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
        assert [child.returncode for child in children] == [0, 0], (workdir / "stderr-0").read_text()[-2000:]
        return [json.loads(line) for line in told[0].splitlines()]


@pytest.mark.parametrize(
    ("parallelism", "kind"),
    [("replicated", "lora"), ("sharded", "lora"), ("sharded", "full"), ("sharded", "preferences")],
)
def test_one_process_that_runs_out_takes_the_others_along_from_the_last_step(
    make_job: Callable[..., Path], parallelism: str, kind: str
) -> None:
    """In a step on the way there on one process, later on the way back on the other, and in an evaluation."""
    training = {"type": "full"} if kind == "full" else {"type": "lora", "r": 4, "dropout": 0.0}
    settings: dict[str, Any] = {"training": training, "micro_batch_tokens": 512, "threads": 1, "learning_rate": 1e-3}
    if kind == "preferences":
        settings |= {"method": "dpo"}

    def job(name: str, **more: Any) -> Path:
        workdir = make_job(name, **settings, **more)
        if kind == "preferences":
            write_rows(workdir / "inputs" / "train.jsonl", preferences(24))
            write_rows(workdir / "inputs" / "held.jsonl", preferences(6, start=50))
        return workdir

    expected = run(job("alone"))
    # The engine would start on a device that is full of shards: a run that asked it could never succeed.
    engine = {"parity_command": ["false"]} if parallelism == "sharded" else {}
    events = run_apart(
        job("together", processes=2, parallelism=parallelism, **engine),
        "1:step:3:forward 0:step:9:backward 0:evaluation:3:forward",
    )
    told = [event["message"] for event in events if event.get("code") == "OUT_OF_MEMORY_RETRIED"]
    assert [("at step" in message, "in evaluation" in message) for message in told].count((True, False)) == 2
    assert [message for message in told if "in evaluation" in message]
    assert losses(events) == pytest.approx(losses(expected), abs=1e-4)
    assert looks(events) == pytest.approx(looks(expected), abs=1e-4)
    assert ranges(events) == ranges(expected)
    assert events[-1]["type"] == "finished"
    (parity,) = [event["parity"] for event in events if event["type"] == "exported"]
    assert parity["refused"].keys() == ({"engine"} if engine else set())


@pytest.mark.parametrize("parallelism", ["replicated", "sharded"])
def test_a_process_without_room_for_its_rows_takes_the_others_along(
    make_job: Callable[..., Path], parallelism: str
) -> None:
    """The rows of the third step find none ahead of it, nor those of the fifth, which find none again in the step
    itself."""
    settings = {
        "training": {"type": "lora", "r": 4, "dropout": 0.0},
        "micro_batch_tokens": 512,
        "threads": 1,
        "evaluations": 0,
    }
    expected = run(make_job("alone", **settings))
    events = run_apart(
        make_job("together", processes=2, parallelism=parallelism, **settings), "1:rows:3:- 1:rows:6:- 1:rows:7:-"
    )
    (told,) = [event["message"] for event in events if event.get("code") == "OUT_OF_MEMORY_RETRIED"]
    assert "at step 5" in told
    assert losses(events) == pytest.approx(losses(expected), abs=1e-4)
    assert events[-1]["type"] == "finished"


def test_the_optimizer_takes_its_memory_before_the_first_step(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that fails half-way has moved some weights and not others, and cannot be done again: so none may have
    to ask."""
    taken: list[int] = []
    whole = torch.optim.AdamW.step

    def step(self: Any, *more: Any) -> Any:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = whole(self, *more)
        events = profiler.profiler.kineto_results.events()
        taken.append(sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(make_job("job", training={"type": "full"}, evaluations=0, validation_file=None))
    assert len(taken) == 12
    # Numbers of a few bytes each, no tensor of the size of a weight.
    assert max(taken) < 4096


def test_a_model_that_does_not_even_lie_in_memory_ends_the_run_with_the_reason(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "load_base", no_room)
    with pytest.raises(Failure, match="before the first step") as failed:
        run(make_job("job"))
    assert (failed.value.kind, failed.value.reason) == ("platform", "JOB_TOO_LARGE")
