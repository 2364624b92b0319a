"""Every known trap of resuming that needs weights to be seen: a run goes on from each of its checkpoints, in another
folder, as another node would, and must end in the bytes, losses and metered ranges of the run that nothing disturbed.

Earns its seconds: the last test removes each cure in turn and shows that the comparison notices.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from services.trainer.train.checkpoint import resume
from services.trainer.train.checkpoint.position import Position
from services.trainer.train.checkpoint.resume import find_checkpoint
from services.trainer.train.data import schedule as planning
from services.trainer.train.data.batches.run_batches import batches_of_step, validation_batches
from services.trainer.train.data.run_inputs import Inputs, prepare_inputs
from services.trainer.train.data.schedule import RunSchedule
from services.trainer.train.loop import step as stepping
from services.trainer.train.loop.progress_report import Progress
from services.trainer.train.loop.run import train
from services.trainer.train.loop.start_run import start_run
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import write_job

Events = list[dict[str, Any]]
STEPS, STEPS_PER_EPOCH = 14, 7
# 13 packed sequences, 2 a step: the last accumulation group of an epoch, at steps 7 and 14, holds one.
SETTINGS: dict[str, Any] = {
    "batch_size": 1, "gradient_accumulation_steps": 2, "checkpoint_every_steps": 1, "keep_last": 100, "packing": True,
    "max_seq_length": 96, "micro_batch_tokens": 64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reference:
    base: Path
    workdir: Path
    events: Events


def write(workdir: Path, base: Path, **changes: Any) -> Path:
    return write_job(workdir, base, **{**SETTINGS, **changes})


def run(workdir: Path) -> Events:
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    return events


def inputs_of(workdir: Path) -> Inputs:
    return prepare_inputs(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, lambda *_, **__: None)


def told_after(events: Events, step: int) -> dict[str, Any]:
    """What a run says about the work beyond a step: every step with loss, rate and norm, metered ranges, evaluations,
    the end."""
    return {
        "steps": [entry for event in events for entry in event.get("steps", []) if entry["step"] > step],
        "ranges": [
            (event["start_step"], event["end_step"], event["train_tokens"])
            for event in events
            if event["type"] == "progress" and event["end_step"] > step
        ],
        "evaluations": [
            (event["evaluation"], event["step"], event["validation_tokens"], event["loss"])
            for event in events
            if event["type"] == "evaluation" and event["step"] > step
        ],
        "end": [
            {
                name: event[name]
                for name in ("total_steps", "train_tokens", "validation_tokens", "final_loss", "revision")
            }
            for event in events
            if event["type"] == "finished"
        ],
    }


def continued(reference: Reference, step: int, workdir: Path, **changes: Any) -> Path:
    """A folder of another node that got nothing but the inputs and the checkpoint at `step`."""
    write(workdir, reference.base, **changes)
    name = f"step-{step:08d}"
    shutil.copytree(reference.workdir / "checkpoints" / name, workdir / "checkpoints" / name)
    return workdir


@pytest.fixture(scope="module")
def reference(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    base = base_model("tiny-llama")
    workdir = write(tmp_path_factory.mktemp("resume") / "undisturbed", base)
    return Reference(base=base, workdir=workdir, events=run(workdir))


@pytest.mark.parametrize("step", [1, 4, 6, 7, 8, 13, 14])
def test_a_run_goes_on_from_a_step_as_if_nothing_had_happened(reference: Reference, tmp_path: Path, step: int) -> None:
    """Among them: an epoch's end (7), before and behind a partial accumulation group (6, 7), and the last step, where
    only the export is left (14). Steps are compared with loss, rate and norm, so a schedule off by one shows, too."""
    workdir = continued(reference, step, tmp_path / "other-node")
    events = run(workdir)
    assert events[0]["start_step"] == step
    assert told_after(events, step) == told_after(reference.events, step)
    for path in sorted((reference.workdir / "export").iterdir()):
        assert (workdir / "export" / path.name).read_bytes() == path.read_bytes(), path.name
    exported, expected = (
        next(event for event in told if event["type"] == "exported") for told in (events, reference.events)
    )
    assert exported["lineage"] == expected["lineage"]
    assert exported["parity"] == expected["parity"]


def test_the_reference_has_the_shapes_that_the_traps_need(reference: Reference) -> None:
    inputs = inputs_of(reference.workdir)
    assert (inputs.schedule.total_steps, inputs.schedule.steps_per_epoch) == (STEPS, STEPS_PER_EPOCH)
    count = inputs.train.sequences.count
    assert [len(inputs.schedule.sequences_of_step(step, count)) for step in (5, 6, 7, 13)] == [2, 1, 2, 1]
    assert len(batches_of_step(inputs, 0)[0]) > 1, "a step must be of several micro-batches"


def test_preparing_and_fetching_draw_from_no_generator(reference: Reference) -> None:
    """Then batches may be fetched before or after the random states are put back."""
    before = states()
    inputs = inputs_of(reference.workdir)
    for step in range(STEPS):
        batches_of_step(inputs, step)
    list(validation_batches(inputs))
    assert states() == before


def test_a_resumed_run_stands_at_the_random_states_of_its_checkpoint(reference: Reference, tmp_path: Path) -> None:
    """Loading the base and drawing the adapter move them; putting them back comes after."""
    workdir = continued(reference, 9, tmp_path / "job")
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    start_run(inputs_of(workdir), lambda *_, **__: None, lambda: False)
    folder = workdir / "checkpoints" / "step-00000009"
    stored = json.loads((folder / "state.json").read_text())["random"]
    assert torch.equal(torch.get_rng_state(), load_file(folder / "rng.safetensors")["torch_cpu"])
    now = json.loads(states())
    assert now[:2] == [stored["python"], stored["numpy"]]


def states() -> str:
    state: Any = np.random.get_state(legacy=True)
    name, keys, *rest = state
    return json.dumps([random.getstate(), [name, keys.tolist(), *rest], torch.get_rng_state().tolist()])


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "rng.safetensors", "state.json",
     "manifest.json"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_checkpoint_with_a_damaged_file_is_passed_over_for_the_one_before(
    reference: Reference, tmp_path: Path, name: str, damage: str
) -> None:
    root = tmp_path / "checkpoints"
    for step in (7, 8):
        shutil.copytree(reference.workdir / "checkpoints" / f"step-{step:08d}", root / f"step-{step:08d}")
    path = root / "step-00000008" / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
        path.write_bytes(whole[:middle] if damage == "cut" else flipped)
    heard: list[str] = []
    found = find_checkpoint(root, inputs_of(reference.workdir).identity, heard.append)
    assert found == root / "step-00000007"
    assert len(heard) == 1
    assert "step-00000008" in heard[0]


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"seed": 4}, "TRAINING_INPUT_INVALID", "other settings"),
        ({"gradient_accumulation_steps": 1, "batch_size": 2}, "TRAINING_INPUT_INVALID", "other settings"),
        ({"max_seq_length": 128}, "TRAINING_INPUT_INVALID", "another dataset or packing"),
    ],
)
def test_a_checkpoint_of_another_permutation_is_refused(
    reference: Reference, tmp_path: Path, change: dict[str, Any], reason: str, words: str
) -> None:
    workdir = continued(reference, 9, tmp_path / "job", **change)
    path = workdir / "checkpoints" / "step-00000009"
    spec = json.loads((workdir / "spec.json").read_text())
    (workdir / "spec.json").write_text(json.dumps({**spec, "resume_from": str(path)}))
    with pytest.raises(Failure, match=words) as caught:
        run(workdir)
    assert (caught.value.kind, caught.value.reason) == ("user", reason)


def without_random_states(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resume, "_restore_random", lambda *_: None)


def without_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resume, "restore_optimizer", lambda *_: None)


def schedule_one_behind(patch: pytest.MonkeyPatch) -> None:
    whole = vars(stepping)["learning_rate_at"]
    patch.setattr(stepping, "learning_rate_at", lambda step, *more: whole(max(0, step - 1), *more))


def epoch_not_replayed(patch: pytest.MonkeyPatch) -> None:
    whole = planning._cached_order
    patch.setattr(planning, "_cached_order", lambda seed, _epoch, count: whole(seed, 0, count))


def drawing_on_the_way(patch: pytest.MonkeyPatch) -> None:
    whole = stepping.gradients_of_step

    def fetched_after(*arguments: Any) -> Any:
        torch.rand(1)
        return whole(*arguments)

    patch.setattr(stepping, "gradients_of_step", fetched_after)


def partial_group_filled_up(patch: pytest.MonkeyPatch) -> None:
    whole = RunSchedule.sequences_of_step

    def filled(plan: RunSchedule, step: int, count: int) -> Any:
        missing = plan.sequences_per_step - len(chosen := whole(plan, step, count))
        return np.concatenate([chosen, whole(plan, step - 1, count)[:missing]])

    patch.setattr(RunSchedule, "sequences_of_step", filled)


@pytest.mark.parametrize(
    "fall_into",
    [
        without_random_states,
        without_optimizer,
        schedule_one_behind,
        epoch_not_replayed,
        drawing_on_the_way,
        partial_group_filled_up,
    ],
)
def test_the_comparison_notices_each_trap(
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fall_into: Callable[[pytest.MonkeyPatch], None],
) -> None:
    workdir = continued(reference, 7, tmp_path / "job")
    fall_into(monkeypatch)
    events = run(workdir)
    assert told_after(events, 7)["steps"] != told_after(reference.events, 7)["steps"]
    assert told_after(events, 7)["end"] != told_after(reference.events, 7)["end"]


def a_step_told_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Progress, "start_at", lambda progress, at: setattr(progress, "_start_step", at.step - 1))


def a_meter_that_starts_anew(patch: pytest.MonkeyPatch) -> None:
    whole = Position.__init__

    def forgetful(position: Position, **fields: Any) -> None:
        whole(position, **{**fields, **({"metered_train_tokens": 0} if fields.get("step") == 7 else {})})

    patch.setattr(Position, "__init__", forgetful)


@pytest.mark.parametrize(("fall_into", "seen_in"), [(a_step_told_again, "ranges"), (a_meter_that_starts_anew, "end")])
def test_the_comparison_notices_what_is_metered_twice_or_not_at_all(
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fall_into: Callable[[pytest.MonkeyPatch], None],
    seen_in: str,
) -> None:
    workdir = continued(reference, 7, tmp_path / "job")
    fall_into(monkeypatch)
    events = run(workdir)
    assert told_after(events, 7)["steps"] == told_after(reference.events, 7)["steps"]
    assert told_after(events, 7)[seen_in] != told_after(reference.events, 7)[seen_in]
