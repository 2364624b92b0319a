"""Killed at any moment, resumed, and still the same bytes: real children, real SIGKILL.

Earns its seconds: a run that ends in other weights after a crash, or meters a step twice, is what nobody may ever see.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.trainer.train.analysis.main import analyze
from services.trainer.train.checkpoint.resume import find_checkpoint
from services.trainer.train.data.run_inputs import Identity
from services.trainer.train.disk import durable
from services.trainer.train.disk.durable import read_whole_folder
from services.trainer.train.loop.run import train
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import write_job

Events = list[dict[str, Any]]
DEADLY = "tests.train.deadly_child"


def events_until(child: "subprocess.Popen[str]", enough: Callable[[dict[str, Any]], bool]) -> Events:
    assert child.stdout is not None
    events: Events = []
    for line in child.stdout:
        events.append(json.loads(line))
        if enough(events[-1]):
            break
    return events


def kill(child: "subprocess.Popen[str]") -> Events:
    """What it said before it died counts, but for half a line: it may have gone on while nobody listened."""
    child.kill()
    assert child.stdout is not None
    events = [json.loads(line) for line in child.stdout if line.endswith("\n")]
    child.wait()
    return events


def finish(child: "subprocess.Popen[str]") -> Events:
    events = events_until(child, lambda _: False)
    assert child.wait(timeout=60) == 0, events[-1:]
    assert events[-1]["type"] == "finished"
    return events


def run_in_process(workdir: Path) -> Events:
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    return events


def adapter_sha256(workdir: Path) -> str:
    return hashlib.sha256((workdir / "export" / "adapter_model.safetensors").read_bytes()).hexdigest()


def metered(events: Events) -> dict[tuple[Any, ...], int]:
    """What a meter keeps that knows each key once."""
    kept: dict[tuple[Any, ...], int] = {}
    for event in events:
        if event["type"] == "progress":
            key: tuple[Any, ...] = ("train", event["start_step"], event["end_step"])
            tokens = event["train_tokens"]
        elif event["type"] == "evaluation":
            key, tokens = ("evaluation", event["evaluation"]), event["validation_tokens"]
        else:
            continue
        assert kept.setdefault(key, tokens) == tokens
    return kept


def losses(events: Events) -> dict[int, float]:
    trace: dict[int, float] = {}
    for event in events:
        for step in event.get("steps", []):
            assert trace.setdefault(step["step"], step["loss"]) == step["loss"], "redone work had another loss"
    return trace


@pytest.fixture(scope="module")
def undisturbed(
    base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, spawn_module_child: Any
) -> tuple[Path, Events]:
    workdir = write_job(tmp_path_factory.mktemp("resume") / "undisturbed", base_model("tiny-llama"))
    return workdir, finish(spawn_module_child(workdir))


def die_at(child: "subprocess.Popen[str]") -> Events:
    """What the deadly child told before it killed itself."""
    events = events_until(child, lambda _: False)
    assert child.wait(timeout=60) == -signal.SIGKILL
    return events


def move_to_another_node(workdir: Path, target: Path) -> Path:
    """As the agent does it: the inputs, and the newest checkpoint that was told, named as the place to go on from."""
    newest = sorted((workdir / "checkpoints").glob("step-*"))[-1]
    shutil.copytree(workdir / "inputs", target / "inputs")
    shutil.copytree(newest, target / "resume")
    spec = json.loads((workdir / "spec.json").read_text())
    (target / "spec.json").write_text(json.dumps({**spec, "resume_from": "resume"}))
    return target


def test_a_run_killed_at_every_stage_and_moved_ends_in_the_same_bytes(
    make_job: Callable[..., Path], spawn_child: Any, undisturbed: tuple[Path, Events]
) -> None:
    """Dies while it writes a checkpoint, at a random step, and during the export on another node, each in its own
    process."""
    reference, expected = undisturbed
    dice = random.Random(os.environ.get("FINEMESH_TEST_SEED", "11"))
    workdir = make_job("killed")
    torn = dice.choice((4, 6))
    seen = die_at(spawn_child(workdir, module=DEADLY, FINEMESH_TEST_DIE_AT=f"tmp-step-{torn:08d}/optimizer"))
    assert (workdir / "checkpoints" / f"tmp-step-{torn:08d}").exists()
    child = spawn_child(workdir)
    kill_at = dice.randint(torn, 11)
    seen += events_until(child, lambda event: event.get("end_step", 0) >= kill_at)
    seen += kill(child)
    moved = move_to_another_node(workdir, workdir.parent / "moved")
    seen += die_at(spawn_child(moved, module=DEADLY, FINEMESH_TEST_DIE_AT="tmp-export/adapter"))
    assert not (moved / "export").exists()
    seen += finish(spawn_child(moved))

    assert [event["start_step"] for event in seen if event["type"] == "started"][:2] == [0, torn - 2]
    discarded = [event["message"] for event in seen if event.get("code") == "CHECKPOINT_DISCARDED"]
    assert discarded == [f"tmp-step-{torn:08d} was left unfinished", "tmp-export was left unfinished"]
    assert not list(moved.rglob("tmp-*"))
    assert adapter_sha256(moved) == adapter_sha256(reference)
    assert seen[-1]["revision"] == expected[-1]["revision"]
    assert losses(seen) == losses(expected)
    assert metered(seen) == metered(expected)


def test_a_run_killed_again_and_again_at_any_moment_ends_in_the_same_bytes(
    make_job: Callable[..., Path], spawn_child: Any, undisturbed: tuple[Path, Events]
) -> None:
    """No stage is chosen here: whatever a child does beside its steps, preparing ahead or writing behind, may be cut
    off."""
    reference, expected = undisturbed
    dice = random.Random(os.environ.get("FINEMESH_TEST_SEED", "12"))
    workdir = make_job("killed")
    seen: Events = []
    for _ in range(3):
        child = spawn_child(workdir)
        seen += [json.loads(line) for line in itertools.islice(child.stdout, dice.randint(1, 9))]
        time.sleep(dice.uniform(0, 0.05))
        seen += kill(child)
    seen += finish(spawn_child(workdir))
    assert adapter_sha256(workdir) == adapter_sha256(reference)
    assert losses(seen) == losses(expected)
    assert metered(seen) == metered(expected)


def test_a_full_disk_fails_cleanly_and_loses_no_committed_checkpoint(
    make_job: Callable[..., Path], spawn_child: Any, undisturbed: tuple[Path, Events]
) -> None:
    """The kernel refuses the write of the second checkpoint half-way; when there is room again, the run goes on."""
    reference, expected = undisturbed
    workdir = make_job("full")
    child = spawn_child(workdir, module=DEADLY, FINEMESH_TEST_FULL_AT="tmp-step-00000004")
    seen = events_until(child, lambda _: False)
    assert child.wait(timeout=60) == 3
    failed = seen[-1]
    assert (failed["type"], failed["kind"], failed["reason"]) == ("failed", "platform", "TRAINING_FAILED")
    assert failed["details"] == {"cause": "disk_full"}
    assert "step-00000004 could not be written" in failed["message"]
    assert failed["last_checkpoint_step"] == 2
    # It is noticed while the run goes on, and at the next checkpoint at the latest.
    assert 4 <= failed["step"] <= 6
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["step-00000002"]
    seen += finish(spawn_child(workdir))
    assert [event["start_step"] for event in seen if event["type"] == "started"] == [0, 2]
    assert adapter_sha256(workdir) == adapter_sha256(reference)
    assert metered(seen) == metered(expected)


def test_the_metered_sum_is_the_analysed_one(make_job: Callable[..., Path], undisturbed: tuple[Path, Events]) -> None:
    workdir, events = undisturbed
    spec = json.loads((workdir / "spec.json").read_text())
    answer = analyze(
        {name: spec[name] for name in ("base_model", "epochs", "evaluations", "batch_size", "packing")}
        | {"train_file": str(workdir / spec["train_file"]), "validation_file": str(workdir / spec["validation_file"])}
    )
    kept = metered(events)
    assert sum(tokens for key, tokens in kept.items() if key[0] == "train") == answer["billed_train_tokens"]
    assert sum(tokens for key, tokens in kept.items() if key[0] == "evaluation") == answer["billed_validation_tokens"]
    ranges = sorted(key[1:] for key in kept if key[0] == "train")
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert answer["total_steps"] == events[0]["total_steps"] == ranges[-1][1]
    assert (events[-1]["train_tokens"], events[-1]["validation_tokens"]) == (
        answer["billed_train_tokens"],
        answer["billed_validation_tokens"],
    )


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing on the way catches it or cleans up."""


def test_a_resume_with_other_instructions_of_the_processor_says_so(
    make_job: Callable[..., Path], spawn_child: Any, undisturbed: tuple[Path, Events]
) -> None:
    """torch takes the environment's word for what the processor can. The sums then come out in other bytes."""
    middle = undisturbed[0] / "checkpoints" / "step-00000012"
    told = {}
    for name, environment in (("same", {}), ("other", {"ATEN_CPU_CAPABILITY": "default"})):
        onward = make_job(name, resume_from=str(middle))
        events = finish(spawn_child(onward, **environment))
        told[name] = [event["message"] for event in events if event["type"] == "warning"]
    assert told["same"] == []
    (message,) = told["other"]
    assert f"{torch.backends.cpu.get_cpu_capability()} instead of " in message
    assert "DEFAULT" in message


@pytest.mark.parametrize(
    "kind", [{"training": {"type": "lora", "r": 4, "dropout": 0.1}, "packing": True}, {"training": {"type": "full"}}]
)
def test_a_torn_checkpoint_is_never_chosen(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    """Dies at every stage of writing the second checkpoint: after the files, before the rename, right after it."""
    settings = {"batch_size": 2, **kind}
    reference = make_job("reference", **settings)
    expected = run_in_process(reference)
    for stage in ("digest", "sync", "renamed"):
        workdir = make_job(stage, **settings)
        seen: Events = []
        with monkeypatch.context() as patch:
            _die_in_second_commit(patch, stage)
            spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)

            def tell(kind: str, /, *, _to: Events = seen, **more: Any) -> None:
                _to.append({"type": kind, **more})

            with pytest.raises(Killed):
                train(spec, workdir, tell, lambda: False)
        torn = [path.name for path in (workdir / "checkpoints").iterdir() if path.name.startswith("tmp-")]
        assert bool(torn) == (stage != "renamed")
        seen += run_in_process(workdir)
        discarded = [event for event in seen if event.get("code") == "CHECKPOINT_DISCARDED"]
        assert len(discarded) == len(torn)
        assert not list((workdir / "checkpoints").glob("tmp-*"))
        assert losses(seen) == losses(expected)
        assert metered(seen) == metered(expected)
        for path in sorted((reference / "export").iterdir()):
            assert (workdir / "export" / path.name).read_bytes() == path.read_bytes(), path.name


def _die_in_second_commit(patch: pytest.MonkeyPatch, stage: str) -> None:
    whole = {"digest": durable.digest_files, "sync": durable._sync, "renamed": durable._sync}[stage]

    def deadly(path: Path) -> Any:
        unfinished = "tmp-step-00000004" in str(path)
        if (stage == "renamed" and (path / "step-00000004").exists()) or (stage != "renamed" and unfinished):
            raise Killed
        return whole(path)

    patch.setattr(durable, "digest_files" if stage == "digest" else "_sync", deadly)


def test_old_safety_checkpoints_go_and_asked_ones_stay(make_job: Callable[..., Path]) -> None:
    workdir = make_job(checkpoints=3, checkpoint_every_steps=1, keep_last=2)
    run_in_process(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (4, 8, 10, 11, 12)
    ]


def test_a_checkpoint_of_another_run_is_refused_with_the_reason(make_job: Callable[..., Path]) -> None:
    workdir = make_job()
    run_in_process(workdir)
    path = sorted((workdir / "checkpoints").iterdir())[-1]
    own = json.loads((path / "state.json").read_text())["identity"]
    heard: list[str] = []
    assert find_checkpoint(workdir / "checkpoints", Identity(**own), heard.append) == path
    for field, message in (
        ("base_revision", "base model revision"),
        ("packing_digest", "another dataset"),
        ("spec_digest", "other settings"),
    ):
        heard.clear()
        assert find_checkpoint(workdir / "checkpoints", Identity(**{**own, field: "x"}), heard.append) is None
        assert message in heard[0]
    spec = json.loads((workdir / "spec.json").read_text())
    (workdir / "spec.json").write_text(json.dumps({**spec, "seed": 4, "resume_from": str(path)}))
    with pytest.raises(Failure, match="other settings") as caught:
        run_in_process(workdir)
    assert caught.value.kind == "user"


def test_sigterm_finishes_the_step_and_reports_it(make_job: Callable[..., Path], spawn_child: Any) -> None:
    child = spawn_child(workdir := make_job(epochs=50, checkpoint_every_steps=50))
    events = events_until(child, lambda event: event["type"] == "progress")
    child.send_signal(signal.SIGTERM)
    events += events_until(child, lambda _: False)
    assert child.wait(timeout=30) == 0
    assert events[-1]["type"] == "stopped"
    ranges = [event for event in events if event["type"] == "progress"]
    assert ranges[-1]["end_step"] == events[-1]["step"]
    assert sum(event["train_tokens"] for event in ranges) == events[-1]["train_tokens"]
    assert not (workdir / "export").exists()


def test_the_child_dies_with_its_agent(make_job: Callable[..., Path], spawn_child: Any) -> None:
    child = spawn_child(make_job(epochs=50))
    events_until(child, lambda event: event["type"] == "progress")
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(timeout=30) == 4


def test_a_warm_child_waits_for_its_work(make_job: Callable[..., Path], spawn_child: Any) -> None:
    workdir = make_job(epochs=1, evaluations=0)
    child = spawn_child(workdir, "--wait")
    assert events_until(child, lambda _: True)[0]["type"] == "ready"
    assert child.stdin is not None
    child.stdin.write(json.dumps({"workdir": str(workdir)}) + "\n")
    child.stdin.flush()
    finish(child)


def test_every_checkpoint_is_whole_and_loads_without_pickle(make_job: Callable[..., Path]) -> None:
    workdir = make_job()
    run_in_process(workdir)
    for path in (workdir / "checkpoints").iterdir():
        manifest = read_whole_folder(path)
        assert {entry["path"].rsplit(".", 1)[1] for entry in manifest["files"]} == {"json", "safetensors"}
