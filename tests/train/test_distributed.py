"""Two processes, one machine or two, give what one process gives; what one of them leaves, any number goes on from.

Each run starts real processes through torch's elastic launcher: about ten seconds apiece, which is what the proof
costs.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import held_port

Events = list[dict[str, Any]]
LORA = {"type": "lora", "r": 4, "dropout": 0.0}
FULL = {"type": "full"}
# The held-out loss falls, rises, and ends the run.
HOT = {
    "epochs": 6,
    "learning_rate": 3e-2,
    "warmup_ratio": 0.0,
    "schedule": {"type": "linear", "min_lr_ratio": 1.0},
    "early_stopping": {"patience": 1, "warmup_evaluations": 0},
}
# The sums of two processes come in another order than those of one.
SAME = 1e-4


def settings_of(training: dict[str, Any]) -> dict[str, Any]:
    rate = 1e-3 if training["type"] == "full" else 5e-3
    return {"training": training, "learning_rate": rate, "keep_last": 20, "threads": 1}


def finish(child: Any) -> Events:
    events = [json.loads(line) for line in child.stdout]
    assert child.wait(timeout=120) == 0, events[-1:]
    return events


def losses(events: Events) -> dict[int, float]:
    return {
        step["step"]: step["loss"] for event in events if event["type"] == "progress" for step in event["steps"]
    } | {-event["evaluation"]: event["loss"] for event in events if event["type"] == "evaluation"}


def metered(events: Events) -> dict[tuple[Any, ...], int]:
    ranges = {
        (event["start_step"], event["end_step"]): event["train_tokens"]
        for event in events
        if event["type"] == "progress"
    }
    return ranges | {
        ("evaluation", event["evaluation"]): event["validation_tokens"]
        for event in events
        if event["type"] == "evaluation"
    }


def exported(workdir: Path) -> dict[str, Any]:
    (path,) = (workdir / "export").glob("*.safetensors")
    return load_file(path)


def assert_same_run(workdir: Path, events: Events, reference: Path, expected: Events) -> None:
    found = losses(events)
    assert found == pytest.approx({step: loss for step, loss in losses(expected).items() if step in found}, abs=SAME)
    assert metered(events).items() <= metered(expected).items()
    assert_same_weights(workdir, reference)


def assert_same_weights(workdir: Path, reference: Path) -> None:
    weights = exported(reference)
    assert exported(workdir).keys() == weights.keys()
    for name, tensor in exported(workdir).items():
        torch.testing.assert_close(tensor, weights[name], atol=SAME, rtol=0.0)


@pytest.mark.parametrize("training", [LORA, FULL], ids=["lora", "full"])
def test_processes_give_the_losses_and_weights_of_one_and_continue_one_another(
    make_job: Callable[..., Path], spawn_child: Any, training: dict[str, Any]
) -> None:
    """Replicated and sharded, then from one to two and from two to one, out of whole files and out of shards."""
    settings = settings_of(training)
    reference = make_job("one", **settings)
    expected = finish(spawn_child(reference))
    middle = "checkpoints/step-00000006"
    for parallelism in ("replicated", "sharded"):
        two = make_job(parallelism, processes=2, parallelism=parallelism, **settings)
        events = finish(spawn_child(two))
        assert (events[0]["processes"], events[0]["sharded"]) == (2, parallelism == "sharded")
        assert metered(events) == metered(expected)
        assert_same_run(two, events, reference, expected)
        files = {path.relative_to(two / middle).as_posix() for path in (two / middle).rglob("*") if path.is_file()}
        assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
        assert any(name.startswith("shards/") for name in files) == (parallelism == "sharded")

        onward = make_job(f"{parallelism}-then-one", resume_from=str(two / middle), **settings)
        events = finish(spawn_child(onward))
        assert [event["code"] for event in events if event["type"] == "warning"] == ["RESUME_NOT_EXACT"]
        assert next(event for event in events if event["type"] == "started")["start_step"] == 6
        assert_same_run(onward, events, reference, expected)

        onward = make_job(
            f"one-then-{parallelism}",
            resume_from=str(reference / middle),
            processes=2,
            parallelism=parallelism,
            **settings,
        )
        assert_same_run(onward, finish(spawn_child(onward)), reference, expected)


def test_a_mixture_of_experts_is_balanced_over_all_processes(make_job: Callable[..., Path], spawn_child: Any) -> None:
    """Sharded, with a router and experts that are trained: the balancing loss of a step is that of all its rows."""
    settings = {"model": "tiny-mixtral", "epochs": 1, "evaluations": 0, "validation_file": None, **settings_of(FULL)}

    def balancing(events: Events) -> list[float]:
        return [step["balancing_loss"] for event in events if event["type"] == "progress" for step in event["steps"]]

    reference = make_job("one", **settings)
    expected = finish(spawn_child(reference))
    two = make_job("two", processes=2, parallelism="sharded", **settings)
    events = finish(spawn_child(two))
    assert len(balancing(expected)) == 6
    # Two of four experts are chosen: 2 is the least that a balanced router gets.
    assert min(balancing(expected)) > 2.0
    assert balancing(events) == pytest.approx(balancing(expected), abs=SAME)
    assert_same_run(two, events, reference, expected)


@pytest.fixture
def meeting_point() -> Iterator[Callable[[], str]]:
    """Gives endpoints of this machine that are nobody else's until the test ends."""
    with ExitStack() as held:
        yield lambda: f"127.0.0.1:{held.enter_context(held_port())}"


def two_machines(make_job: Callable[..., Path], endpoint: str, name: str, **settings: Any) -> list[Path]:
    """Two folders stand for two machines; the second one leads, which torch's rendezvous would not have chosen."""
    gang = {"nodes": 2, "endpoint": endpoint, "id": f"ft-{name}", "address": "127.0.0.1"}
    return [
        make_job(f"{name}-{number}", gang={**gang, "leads": number == 1}, **{"parallelism": "sharded", **settings})
        for number in range(2)
    ]


def test_two_machines_meet_at_an_endpoint_and_the_leading_one_speaks(
    make_job: Callable[..., Path], spawn_child: Any, meeting_point: Callable[[], str]
) -> None:
    """Two launchers, brought together by torch's rendezvous; what they leave, one process goes on from, and the other
    way round."""
    settings = settings_of(LORA)
    reference = make_job("one", **settings)
    expected = finish(spawn_child(reference))
    follower, leader = two_machines(make_job, meeting_point(), "machine", **settings)
    children = [spawn_child(follower), spawn_child(leader)]
    nothing, events = [finish(child) for child in children]
    assert nothing == []
    assert (events[0]["processes"], events[0]["sharded"]) == (2, True)
    assert metered(events) == metered(expected)
    assert_same_run(leader, events, reference, expected)
    assert not (follower / "export").exists()

    for name, origin, nodes in (("alone", leader, 1), ("again", reference, 2)):
        resumed = {"resume_from": str(origin / "checkpoints/step-00000006"), **settings}
        folders = (
            [make_job(name, **resumed)] if nodes == 1 else two_machines(make_job, meeting_point(), name, **resumed)
        )
        told = [finish(child) for child in [spawn_child(folder) for folder in folders]][-1]
        assert next(event for event in told if event["type"] == "started")["start_step"] == 6
        assert_same_run(folders[-1], told, reference, expected)


@pytest.mark.parametrize("parallelism", ["replicated", "sharded"])
def test_two_machines_ship_the_best_evaluation_of_one(
    make_job: Callable[..., Path], spawn_child: Any, meeting_point: Callable[[], str], parallelism: str
) -> None:
    """From the first step on, and from a checkpoint that brings an older best along: each machine has a folder of its
    own."""
    settings = {**settings_of(LORA), **HOT, "checkpoint_every_steps": 1, "keep_last": 100}
    reference = make_job("one", **settings)
    expected = finish(spawn_child(reference))
    best_step, last = expected[-1]["best_step"], expected[-1]["step"]
    before = max(event["step"] for event in expected if event["type"] == "evaluation" and event["step"] < best_step)
    assert expected[-1]["stopped_early"]
    assert 0 < before < best_step < last
    older = {"resume_from": str(reference / f"checkpoints/step-{before:08d}")}
    for name, resumed in (("fresh", {}), ("resumed", older)):
        folders = two_machines(make_job, meeting_point(), name, parallelism=parallelism, **settings, **resumed)
        told = [finish(child) for child in [spawn_child(folder) for folder in folders]][-1]
        assert (told[-1]["best_step"], told[-1]["step"]) == (best_step, last)
        assert_same_weights(folders[-1], reference)


def test_a_lost_machine_ends_the_run_and_its_last_checkpoint_goes_on(
    make_job: Callable[..., Path], spawn_child: Any, meeting_point: Callable[[], str]
) -> None:
    settings = {**settings_of(LORA), "epochs": 10}
    follower, leader = two_machines(make_job, meeting_point(), "machine", **settings)
    children = [spawn_child(follower), spawn_child(leader)]
    events: Events = []
    for line in children[1].stdout:
        events.append(json.loads(line))
        if events[-1]["type"] == "checkpoint" and children[0].poll() is None:
            children[0].kill()
    assert children[1].wait(timeout=120) == 3
    assert (events[-1]["type"], events[-1]["kind"]) == ("failed", "platform")
    assert workers_of(children[1].pid) == []

    reference = make_job("one", **settings)
    expected = finish(spawn_child(reference))
    last = max((leader / "checkpoints").glob("step-*"))
    onward = make_job("on", resume_from=str(last), **settings)
    assert_same_run(onward, finish(spawn_child(onward)), reference, expected)


def test_asked_to_stop_all_processes_finish_the_same_step(make_job: Callable[..., Path], spawn_child: Any) -> None:
    child = spawn_child(make_job(epochs=50, checkpoint_every_steps=50, processes=2, threads=1))
    events: Events = []
    for line in child.stdout:
        events.append(json.loads(line))
        if events[-1]["type"] == "progress":
            child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 0
    assert events[-1]["type"] == "stopped"
    assert sum(event["train_tokens"] for event in events if event["type"] == "progress") == events[-1]["train_tokens"]


def test_a_dead_process_ends_the_run_with_its_reason_and_leaves_nobody(
    make_job: Callable[..., Path], spawn_child: Any
) -> None:
    child = spawn_child(make_job(epochs=50, processes=2, threads=1))
    events: Events = []
    workers: list[int] = []
    for line in child.stdout:
        events.append(json.loads(line))
        if events[-1]["type"] == "progress" and not workers:
            workers = workers_of(child.pid)
            os.kill(workers[1], signal.SIGKILL)
    assert child.wait(timeout=60) == 3
    assert (events[-1]["type"], events[-1]["kind"]) == ("failed", "platform")
    assert "killed by signal 9" in events[-1]["message"]
    assert len(workers) == 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def workers_of(pid: int) -> list[int]:
    """The launcher's children, oldest first; none once it is gone itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return sorted(int(number) for number in children.read_text().split()) if children.exists() else []


def test_what_every_process_refuses_is_told_once(make_job: Callable[..., Path], spawn_child: Any) -> None:
    child = spawn_child(make_job(processes=2, max_seq_length=100_000))
    events = [json.loads(line) for line in child.stdout]
    assert child.wait(timeout=60) == 2
    assert [(event["type"], event["reason"]) for event in events] == [("failed", "INVALID_FIELD")]
    assert events[0]["violations"][0]["field"] == "max_seq_length"


def test_what_a_following_machine_alone_finds_is_told_by_both(
    make_job: Callable[..., Path], spawn_child: Any, meeting_point: Callable[[], str]
) -> None:
    """Its copy of the base is torn; the leading one would know only that a peer is gone."""
    follower, leader = two_machines(make_job, meeting_point(), "machine", **settings_of(LORA))
    spec = json.loads((follower / "spec.json").read_text())
    shutil.copytree(spec["base_model"]["directory"], follower / "base")
    weights = follower / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    base = {**spec["base_model"], "directory": "base"}
    (follower / "spec.json").write_text(json.dumps({**spec, "base_model": base}))
    children = [spawn_child(follower), spawn_child(leader)]
    told = [[json.loads(line) for line in child.stdout][-1] for child in children]
    assert [child.wait(timeout=120) for child in children] == [2, 2]
    for event in told:
        assert (event["type"], event["kind"], event["reason"]) == ("failed", "user", "MODEL_INVALID")
        assert "model.safetensors" in event["message"]
