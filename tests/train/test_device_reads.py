"""A step is launched without a look at the device: on a GPU each look would let it run dry. This machine has none, so
every operation of a step is asked whether it hands a value, or a size that depends on values, to the host.

Earns its minute: a look that a library or a change brings in is seen here by name.
"""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from services.trainer.train.data import schedule as plan
from services.trainer.train.data.batches import run_batches
from services.trainer.train.loop import step as stepping
from services.trainer.train.loop.run import train
from services.trainer.train.loop.state import Run
from services.trainer.train.losses.objective import Preferences, Supervised
from services.trainer.train.recipes.model_shapes import RECIPES
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import conversations, preferences, write_rows

Events = list[dict[str, Any]]
Make = Callable[..., Path]
Patch = pytest.MonkeyPatch

_LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Their masks of booleans are turned into places on the host.
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# These go to the host without an operation of their own.
_BY_HAND = ("tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__")


class Looked(AssertionError):
    pass


class NoLook(TorchDispatchMode):
    """Sees forward and backward operations of its thread, libraries' and autograd's own included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _has_mask(args[1]) if func._schema.name in _INDEXING else _LOOKS & set(func.tags):
            raise Looked(str(func))
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


@pytest.fixture
def watched(monkeypatch: Patch) -> list[int]:
    """The numbers of micro-batches of the steps that were launched under watch."""
    counts: list[int] = []
    launching = threading.local()
    launch, attempt = stepping.launch_step, stepping._try

    def watch(run: Run, step: int) -> Any:
        launching.now = True
        try:
            with NoLook():
                return launch(run, step)
        finally:
            launching.now = False

    def count(run: Run, step: int, batches: list[Any]) -> Any:
        counts.append(len(batches))
        return attempt(run, step, batches)

    def refuse(name: str) -> Callable[..., Any]:
        plain = getattr(torch.Tensor, name)

        def look(tensor: Any, *more: Any, **named: Any) -> Any:
            if getattr(launching, "now", False):
                raise Looked(name)
            return plain(tensor, *more, **named)

        return look

    monkeypatch.setattr(stepping, "launch_step", watch)
    monkeypatch.setattr(stepping, "_try", count)
    for name in _BY_HAND:
        monkeypatch.setattr(torch.Tensor, name, refuse(name))
    return counts


def run(workdir: Path) -> Events:
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    return events


def short(make: Make, method: str, **changes: Any) -> Path:
    """A step takes several micro-batches; rows have weights."""
    settings = {"epochs": 1, "evaluations": 0, "micro_batch_tokens": 64, "method": method, "validation_file": None}
    workdir = make(**settings | {"training": {"type": "lora", "r": 4}} | changes)
    rows = preferences(8) if method == "dpo" else conversations(8)
    write_rows(workdir / "inputs" / "train.jsonl", [{**row, "weight": 1 + n % 2} for n, row in enumerate(rows)])
    return workdir


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("training", [{"type": "lora", "r": 4, "dropout": 0.1}, {"type": "full"}], ids=["lora", "full"])
def test_a_step_is_launched_without_a_look(
    training: dict[str, Any], method: str, layout: str, make_job: Make, watched: list[int], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(run_batches, "layout_for", lambda _device, **_padded: layout)
    run(short(make_job, method, training=training))
    assert len(watched) == 2
    assert min(watched) > 1


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"tiny-llama", "demo-llama"}))
def test_no_family_looks(name: str, make_job: Make, watched: list[int]) -> None:
    run(short(make_job, "sft", model=name))
    assert watched


def by_item(_model: Any, _batch: Any, loss: Any) -> Any:
    return loss * (1.0 if loss.item() > 0 else 2.0)


def by_list(_model: Any, _batch: Any, loss: Any) -> Any:
    return loss + 0.0 * len(loss.reshape(1).tolist())


def by_mask(_model: Any, batch: Any, loss: Any) -> Any:
    return loss + 0.0 * batch.label_ids[batch.label_ids > 5].sum()


def by_branch(_model: Any, _batch: Any, loss: Any) -> Any:
    return loss if loss > 0 else -loss


@pytest.mark.parametrize("look", [by_item, by_list, by_mask, by_branch])
@pytest.mark.usefixtures("watched")
def test_a_look_is_seen(look: Callable[..., Any], make_job: Make, monkeypatch: Patch) -> None:
    whole = Supervised.loss_sum
    monkeypatch.setattr(
        Supervised, "loss_sum", lambda self, model, batch, *more: look(model, batch, whole(self, model, batch, *more))
    )
    with pytest.raises(Looked):
        run(short(make_job, "sft"))


def state_of(run: Run) -> dict[str, Any]:
    state = {f"weight.{name}": value.detach().clone() for name, value in run.model.trainable.items()}
    for name, value in run.model.trainable.items():
        state |= {f"{kind}.{name}": moment.clone() for kind, moment in run.optimizer.state[value].items()}
    return state


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_poisoned_update_is_left_out_though_the_host_looks_a_step_later(
    method: str, poison: float, make_job: Make, monkeypatch: Patch
) -> None:
    """With reports every 6 steps, that is no later than the run would have looked anyway: steps 5 and 6 of 12 are
    launched one after the other, the gradients of step 5 are poisoned, and step 6 is sound again."""
    monkeypatch.setattr(plan, "REPORTS_PER_RUN", 2)
    launch, before, launched = stepping.launch_step, {}, []
    objective: Any = {"sft": Supervised, "dpo": Preferences}[method]
    whole = objective.loss_sum

    def watch(run: Run, step: int) -> Any:
        before[step] = state_of(run)
        launched.append((run, step))
        return launch(run, step)

    def poisoned(self: Any, model: Any, batch: Any, *more: Any) -> Any:
        return whole(self, model, batch, *more) * (poison if launched[-1][1] == 4 else 1.0)

    monkeypatch.setattr(stepping, "launch_step", watch)
    monkeypatch.setattr(objective, "loss_sum", poisoned)
    workdir = make_job(
        evaluations=0, validation_file=None, method=method, checkpoint_every_steps=3, training={"type": "full"}
    )
    if method == "dpo":
        write_rows(workdir / "inputs" / "train.jsonl", preferences(24))
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    with pytest.raises(Failure, match=r"diverged at step 5: .*checkpoint is at step 3") as caught:
        train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    assert (caught.value.kind, caught.value.step, caught.value.last_checkpoint_step) == ("user", 4, 3)
    assert max(event["end_step"] for event in events if event["type"] == "progress") == 4
    assert [step for _, step in launched] == [0, 1, 2, 3, 4, 5]
    after = state_of(launched[-1][0])
    assert all(torch.equal(value, before[4][name]) for name, value in after.items())
    assert not all(torch.equal(value, before[3][name]) for name, value in after.items())
    state = json.loads((workdir / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["position"]["step"] == 3


def test_what_is_told_does_not_depend_on_when_it_is_looked_at(make_job: Make, monkeypatch: Patch) -> None:
    """Steps of a range, the tokens that are metered and the model: one look at the end of a range or one after each
    step."""
    settings = {"evaluations": 0, "validation_file": None, "checkpoint_every_steps": 100}
    often = run(make_job("often", **settings))
    monkeypatch.setattr(plan, "REPORTS_PER_RUN", 2)
    seldom = run(make_job("seldom", **settings))
    ranges = [(event["start_step"], event["end_step"]) for event in seldom if event["type"] == "progress"]
    assert ranges == [(0, 6), (6, 12)]
    told = [
        [step for event in events if event["type"] == "progress" for step in event["steps"]]
        for events in (often, seldom)
    ]
    assert told[0] == told[1]
    ends = [{**events[-1], "elapsed_s": 0} for events in (often, seldom)]
    assert ends[0] == ends[1]
