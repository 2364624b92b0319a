"""The agent with the real training child on a real small model.

Three child starts, most of a minute: the only place where both halves meet without the rest of the mesh, and where a
killed run is compared byte by byte with an undisturbed one.
"""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2
from services.trainer.artifacts.convert import digests_from_proto
from tests.contract.trainer.test_datasets import ask, jsonl, make_request
from tests.contract.trainer.world import AgentWorld, eventually
from tests.harness.hub import running_hub

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What comes after {number}?"},
            {"role": "assistant", "content": f"After {number} comes {number + 1}."},
        ]
    }
    for number in range(40)
]
SLOW_S = 180.0


def one_file(world: AgentWorld, name: str, rows: list[Any]) -> artifact_pb2.Artifact:
    key = f"files/proj_1/{name}"
    return artifact_pb2.Artifact(key=key, files=[world.put(key, jsonl(rows))])


async def make_assignment(world: AgentWorld, base: Path, *, token: int, job: str) -> node_pb2.Assignment:
    assignment = world.assignment(one_file(world, "file-train", ROWS), token=token, job=job)
    assignment.validation_file.CopyFrom(one_file(world, "file-held-out", ROWS[:6]))
    assignment.base_model.CopyFrom(world.put_folder("base/tiny/rv_1/", base))
    assignment.base_model.key = "base/tiny/rv_1/"
    hyper = assignment.spec.hyperparameters
    hyper.epochs, hyper.batch_size, hyper.learning_rate, hyper.evaluations = 4, 1, 1e-3, 1
    hyper.sequence_tokens_max, hyper.checkpoint_interval_steps = 64, 2
    for rows, kind in ((ROWS, "training"), (ROWS[:6], "validation")):
        request = make_request(world, base, jsonl(rows))
        request.sequence_tokens_max = 64
        counted = await ask(world, request)
        setattr(assignment.counts, f"{kind}_tokens", counted.token_count)
    return assignment


async def test_a_killed_run_ends_in_the_same_bytes_and_the_same_usage(world: AgentWorld, tiny_base: Path) -> None:
    """The attempts take children that were waiting with their libraries loaded."""
    await world.start_agent(
        child_module="services.trainer.train.main", threads_per_child=1, warm_memory_bytes_max=4 * 1024**3
    )
    scheduler = world.scheduler

    await scheduler.assign(await make_assignment(world, tiny_base, token=1, job="ft-calm"))
    calm = (await scheduler.wait_for("finish", 1, SLOW_S)).succeeded
    assert calm.kind == "adapter"
    calm_usage, metrics = scheduler.usage, scheduler.of("progress")[-1].metrics
    counts = scheduler_counts(calm_usage)
    assignment = await make_assignment(world, tiny_base, token=2, job="ft-killed")
    assert counts["train"] == 4 * assignment.counts.training_tokens
    assert counts["evaluate"] == 4 * assignment.counts.validation_tokens
    assert metrics[-1].step == metrics[-1].step_count == calm.step
    assert metrics[-1].HasField("validation_loss")
    assert float(json.loads(calm.lineage["parity.max_abs_difference"])) < 1e-3

    scheduler.reports.clear()
    await scheduler.assign(assignment)
    await scheduler.wait_for("commit", 2, SLOW_S)
    os.kill(await running_child(world), signal.SIGKILL)
    failed = (await scheduler.wait_for("finish", 1, SLOW_S)).failed
    assert failed.retryable, failed

    commit = scheduler.of("commit")[-1]
    resumed = await make_assignment(world, tiny_base, token=3, job="ft-killed")
    resumed.resume_from.CopyFrom(commit.checkpoint)
    await scheduler.assign(resumed)
    finish = await scheduler.wait_for("finish", 2, SLOW_S)
    assert finish.WhichOneof("result") == "succeeded", finish
    killed = finish.succeeded
    assert killed.revision == calm.revision
    assert digests_from_proto(killed.model) == digests_from_proto(calm.model)
    assert set(scheduler.usage) == set(calm_usage)
    steps = [item.step for request in scheduler.of("progress") for item in request.metrics]
    assert steps[-1] == calm.step


async def test_a_run_goes_on_with_an_adapter_of_the_hub(world: AgentWorld, tiny_base: Path) -> None:
    """What one job learned and somebody published is where the next one begins;
    an adapter of another rank is refused by it."""
    with running_hub("hf_token-77ab03e5") as hub:
        await world.start_agent(child_module="services.trainer.train.main", threads_per_child=1, hub_endpoint=hub.url)
        first = await make_assignment(world, tiny_base, token=1, job="ft-first")
        await world.scheduler.assign(first)
        shipped = (await world.scheduler.wait_for("finish", 1, SLOW_S)).succeeded.model
        last = losses_of(world)[-1]
        files = {file.path: (world.store / shipped.key / file.path).read_bytes() for file in shipped.files}
        commit = hub.repository("acme/tuned", files)

        second = await make_assignment(world, tiny_base, token=2, job="ft-second")
        second.start_from.hub.repository = "acme/tuned"
        world.scheduler.reports.clear()
        await world.scheduler.assign(second)
        finish = await world.scheduler.wait_for("finish", 1, SLOW_S)
        assert finish.WhichOneof("result") == "succeeded", finish
        assert losses_of(world)[0] <= last + 1e-3
        started = json.loads(finish.succeeded.lineage["started_from"])
        assert (started["repository"], started["revision"]) == ("acme/tuned", commit)

        third = await make_assignment(world, tiny_base, token=3, job="ft-third")
        third.start_from.hub.repository = "acme/tuned"
        third.spec.lora.rank += 1
        await world.scheduler.assign(third)
        failed = (await world.scheduler.wait_for("finish", 2, SLOW_S)).failed
        assert (failed.error.reason, failed.error.platform_fault, failed.retryable) == ("MODEL_INVALID", False, False)
        assert "acme/tuned" in failed.error.message
        assert "r is 4" in failed.error.message


def losses_of(world: AgentWorld) -> list[float]:
    """Of the held-out file, in the order of the evaluations;
    the first one comes before the first step where there is one."""
    metrics = [item for request in world.scheduler.of("progress") for item in request.metrics]
    told = [item.validation_loss for item in metrics if item.HasField("validation_loss")]
    first = [item.initial_validation_loss for item in metrics if item.HasField("initial_validation_loss")]
    return [*first[:1], *told]


async def test_the_real_child_stops_on_request_and_refuses_a_wrong_spec(world: AgentWorld, tiny_base: Path) -> None:
    await world.start_agent(child_module="services.trainer.train.main", threads_per_child=1)
    assignment = await make_assignment(world, tiny_base, token=1, job="ft-stopped")
    assignment.spec.hyperparameters.epochs = 100
    await world.scheduler.assign(assignment)
    await world.scheduler.wait_for("commit", 1, SLOW_S)
    await world.scheduler.cancel(1)
    stopped = (await world.scheduler.wait_for("finish", 1, SLOW_S)).stopped
    assert stopped.step > 0
    trained = [(start, end) for kind, start, end, _ in world.scheduler.usage if kind == "train"]
    assert trained[0][0] == 0
    assert trained[-1][1] == stopped.step
    assert all(earlier[1] == later[0] for earlier, later in itertools.pairwise(trained))

    wrong = await make_assignment(world, tiny_base, token=2, job="ft-wrong")
    wrong.spec.lora.rank = 9999
    await world.scheduler.assign(wrong)
    failed = (await world.scheduler.wait_for("finish", 2, SLOW_S)).failed
    assert (failed.error.reason, failed.error.platform_fault) == ("INVALID_FIELD", False)
    assert any("r" in field for field in failed.error.metadata)


def scheduler_counts(usage: list[tuple[str, int, int, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for kind, _, _, tokens in usage:
        totals[kind] = totals.get(kind, 0) + tokens
    return totals


async def running_child(world: AgentWorld) -> int:
    """The pid of the one training child that works for an attempt of the agent."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdigit() and "train.main" in _command_of(path) and str(world.work) in _folder_of(path)
        ]
        return bool(found)

    await eventually(look)
    return found[0]


def _command_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _folder_of(process: Path) -> str:
    try:
        return os.readlink(process / "cwd")
    except OSError:
        return ""
