"""What happens beside the steps: the next step's rows are laid out, and the last checkpoint's files are written."""

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.trainer.train.checkpoint import writer as checkpoints
from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.data.batches.run_batches import batches_of_step
from services.trainer.train.data.run_inputs import prepare_inputs
from services.trainer.train.disk.durable import commit_folder
from services.trainer.train.loop import run as loop
from services.trainer.train.loop.prefetch import StepBatches
from services.trainer.train.loop.run import train
from services.trainer.train.loop.state import Run
from services.trainer.train.runtime.process_group import ALONE
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import run_job

Events = list[dict[str, Any]]
PATIENCE_S = 60


def run(workdir: Path, hear: Callable[[dict[str, Any]], None] = lambda _: None) -> Events:
    events: Events = []

    def emit(kind: str, /, **fields: Any) -> None:
        events.append({"type": kind, **fields})
        hear(events[-1])

    train(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, emit, lambda: False)
    return events


def weights_at(workdir: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = load_file(workdir / "checkpoints" / f"step-{step:08d}" / "adapter_model.safetensors")
    return found


def test_a_checkpoint_written_late_holds_its_own_step_and_is_told_when_it_is_there(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of step 2 are held back until step 3 is done and told."""
    settings: dict[str, Any] = {"evaluations": 0, "keep_last": 100}
    reference = make_job("reference", **settings)
    run(reference)
    told = Event()

    def late(target: Path, *more: Any) -> Any:
        if target.name == "step-00000002":
            assert told.wait(PATIENCE_S)
        return commit_folder(target, *more)

    monkeypatch.setattr(checkpoints, "commit_folder", late)
    workdir = make_job("late", **settings)
    # The first step after the checkpoint opens the next range; ranges of one step each tell it at once.
    monkeypatch.setattr("services.trainer.train.loop.run.report_when_due", lambda run: run.progress.flush(run.position))

    def hear(event: dict[str, Any]) -> None:
        if event.get("end_step") == 3:
            assert not (workdir / "checkpoints" / "step-00000002").exists()
            told.set()

    events = run(workdir, hear)
    order = [(event["type"], event.get("end_step") or event.get("step")) for event in events]
    assert order.index(("progress", 3)) < order.index(("checkpoint", 2)) < order.index(("checkpoint", 4))
    for step in (2, 4):
        ours, theirs = weights_at(workdir, step), weights_at(reference, step)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (workdir / "export" / "adapter_model.safetensors").read_bytes() == (
        reference / "export" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_run_that_is_stopped_waits_for_its_last_checkpoint(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of step 4 are held back until the run ends; it stops at that step all the same, and they are told
    before its end."""
    ending, whole = Event(), vars(loop)["settle_at_the_end"]

    def late(target: Path, *more: Any) -> Any:
        if target.name == "step-00000004":
            assert ending.wait(PATIENCE_S)
        return commit_folder(target, *more)

    def settle(run: Run) -> None:
        ending.set()
        whole(run)

    monkeypatch.setattr(checkpoints, "commit_folder", late)
    monkeypatch.setattr(loop, "settle_at_the_end", settle)
    workdir = make_job(evaluations=0)
    events = run_job(workdir, stop_after=4)
    told = [(event["type"], event["step"]) for event in events if event["type"] in ("checkpoint", "stopped")]
    assert told == [("checkpoint", 2), ("checkpoint", 4), ("stopped", 4)]
    assert (workdir / "checkpoints" / "step-00000004").is_dir()


def same(left: list[MicroBatch], right: list[MicroBatch]) -> bool:
    return [batch.rows for batch in left] == [batch.rows for batch in right] and all(
        torch.equal(one.input_ids, other.input_ids) and torch.equal(one.label_ids, other.label_ids)
        for one, other in zip(left, right, strict=True)
    )


def test_rows_laid_out_ahead_are_those_of_their_step_and_size(make_job: Callable[..., Path]) -> None:
    """In order, after a halving of micro-batches, and when a step is done again."""
    workdir = make_job()
    inputs = prepare_inputs(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, lambda *_, **__: None)
    batches = StepBatches(inputs, ALONE)
    state = torch.get_rng_state()
    for step, tokens_max in [(0, 768), (1, 768), (1, 64), (2, 64), (0, 768), (11, 768)]:
        laid = batches.take(step, tokens_max)
        assert laid is not None
        found, tokens = laid
        expected, expected_tokens = batches_of_step(inputs, step, ALONE, tokens_max)
        assert tokens == expected_tokens
        assert same(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
