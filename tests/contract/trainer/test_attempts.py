"""Attempts from assignment to ending, by a real agent process with a scripted child;
each test pays one process start."""

import json
import os
import signal

from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2
from tests.contract.trainer.world import AgentWorld, eventually, is_alive, wait_for_death

ALL_USAGE = [("train", 0, 2, 20), ("train", 2, 4, 20)]


async def test_a_run_is_reported_in_order_and_its_model_is_stored(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4, checkpoint_every=2)))
    finish = await world.scheduler.wait_for("finish")

    assert finish.succeeded.kind == "adapter"
    assert finish.succeeded.adapter_rank == 4
    assert finish.succeeded.step == 4
    assert finish.succeeded.lineage["train_sha256"] == "aa"
    assert json.loads(finish.succeeded.lineage["base_model"]) == {"id": "tiny"}
    assert finish.succeeded.lineage["parity.max_abs_difference"] == "0.0"
    assert world.stored("jobs/proj_1/ft-1/models") == [
        finish.succeeded.model.key + name for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert finish.succeeded.model.key == f"jobs/proj_1/ft-1/models/{finish.succeeded.revision}/"
    assert world.scheduler.usage == ALL_USAGE
    assert world.scheduler.steps == [1, 2, 3, 4]
    assert next(kind for kind, _ in world.scheduler.reports) == "start"
    _usage_comes_before_its_checkpoint(world)


async def test_a_checkpoint_is_stored_with_its_manifest_before_it_is_committed(world: AgentWorld) -> None:
    await world.start_agent()
    stored_at_commit: list[list[str]] = []
    prefix = "jobs/proj_1/ft-1/checkpoints"
    world.scheduler.before = lambda kind: stored_at_commit.append(world.stored(prefix)) if kind == "commit" else None
    await world.scheduler.assign(world.assignment(world.script(steps=2, checkpoint_every=2), token=9))
    commit = await world.scheduler.wait_for("commit")
    await world.scheduler.wait_for("finish")

    manifest = commit.checkpoint
    assert manifest.step == 2
    assert manifest.artifact.key == f"{prefix}/2-9/"
    names = [file.path for file in manifest.artifact.files]
    assert sorted(names) == ["manifest.json", "state.json", "weights.safetensors"]
    assert {file.path: file.sha256 for file in manifest.artifact.files}["manifest.json"] == manifest.manifest_sha256
    assert stored_at_commit == [[f"{prefix}/2-9/{name}" for name in sorted(names)]]


async def test_an_attempt_goes_on_from_its_checkpoint(world: AgentWorld) -> None:
    await world.start_agent()
    script = world.script(steps=4, checkpoint_every=2, kill_at_step=3)
    await world.scheduler.assign(world.assignment(script, token=1))
    failed = (await world.scheduler.wait_for("finish")).failed
    checkpoint = world.scheduler.of("commit")[0].checkpoint

    assert failed.retryable
    assert failed.error.platform_fault
    assert "signal 9" in failed.error.message
    await world.scheduler.assign(world.assignment(script, token=2, resume_from=checkpoint))
    finish = await world.scheduler.wait_for("finish", 2)
    assert finish.succeeded.step == 4
    assert world.scheduler.usage == ALL_USAGE
    assert world.scheduler.of("progress")[-1].metrics[-1].trained_tokens == 40


async def test_a_corrupt_checkpoint_is_not_run_from(world: AgentWorld) -> None:
    await world.start_agent()
    key = "jobs/proj_1/ft-1/checkpoints/2-1/"
    files = [world.put(key, b"{}", "manifest.json")]
    good = files[0].sha256
    world.put(key, b"[]", "manifest.json")
    checkpoint = node_pb2.CheckpointManifest(
        step=2, artifact=artifact_pb2.Artifact(key=key, files=files), manifest_sha256=good
    )
    await world.scheduler.assign(world.assignment(world.script(), resume_from=checkpoint))
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.error.reason == "DATA_CORRUPT"
    assert failed.error.platform_fault
    assert failed.retryable
    assert (failed.bad_checkpoint.step, failed.bad_checkpoint.manifest_sha256) == (2, good)
    assert world.children() == []


async def test_a_missing_input_fails_the_attempt(world: AgentWorld) -> None:
    await world.start_agent()
    assignment = world.assignment(world.script())
    (world.store / assignment.training_file.key).unlink()
    await world.scheduler.assign(assignment)
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.error.reason == "DATA_CORRUPT"
    assert not failed.HasField("bad_checkpoint")


async def test_keys_outside_of_the_attempt_are_neither_read_nor_written(world: AgentWorld) -> None:
    await world.start_agent()
    foreign = artifact_pb2.Artifact(
        key="files/proj_2/file-1", files=[world.put("files/proj_2/file-1", b'{"steps": 2}')]
    )
    await world.scheduler.assign(world.assignment(foreign))
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.error.reason == "INVALID_FIELD"
    assert "training_file.key must begin with files/proj_1/" in failed.error.message
    assert failed.error.platform_fault
    assert not list((world.folder / "data" / "cache").rglob("objects/*/*"))


async def test_a_checkpoint_that_is_not_what_was_announced_is_refused(world: AgentWorld) -> None:
    await world.start_agent()
    script = world.script(steps=4, checkpoint_every=2, corrupt_checkpoint=4)
    await world.scheduler.assign(world.assignment(script))
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.error.reason == "DATA_CORRUPT"
    assert failed.retryable
    assert [commit.checkpoint.step for commit in world.scheduler.of("commit")] == [2]
    assert not [path for path in world.stored("jobs") if "/4-7/" in path and path.endswith("weights.safetensors")]
    assert world.stored("jobs/proj_1/ft-1/models") == []


async def test_an_attempt_cleans_up_when_a_heartbeat_overtakes_the_answer_to_its_ending(world: AgentWorld) -> None:
    world.scheduler.finish_answer_s = 0.5
    # One after another, so that the files before the corrupt one are stored when it fails.
    await world.start_agent(transfers_concurrent_max=1)
    script = world.script(steps=4, checkpoint_every=2, corrupt_checkpoint=4)
    await world.scheduler.assign(world.assignment(script))
    await world.scheduler.wait_for("finish")
    assert [path for path in world.stored("jobs") if "/4-7/" in path]
    await eventually(lambda: not [path for path in world.stored("jobs") if "/4-7/" in path])
    assert "no_longer_assigned" not in (world.folder / "agent.log").read_text()


async def test_cancel_finishes_the_step_and_reports_the_partial_range(world: AgentWorld) -> None:
    await world.start_agent()
    script = world.script(steps=1000, checkpoint_every=2, stop_in_step=2)
    await world.scheduler.assign(world.assignment(script))
    pid = await world.wait_for_child()
    await world.scheduler.wait_for("progress")
    await world.scheduler.cancel(7)
    stopped = (await world.scheduler.wait_for("finish")).stopped
    assert stopped.step == 3
    assert world.scheduler.usage == [("train", 0, 2, 20), ("train", 2, 3, 10)]
    assert not is_alive(pid)


async def test_a_child_that_does_not_stop_is_killed_after_the_grace(world: AgentWorld) -> None:
    await world.start_agent(cancel_grace_s=0.3)
    await world.scheduler.assign(world.assignment(world.script(steps=4, checkpoint_every=2, hang_at_step=2)))
    await world.scheduler.wait_for("commit")
    await world.scheduler.cancel(7)
    finish = await world.scheduler.wait_for("finish")
    assert finish.stopped.step == 2


async def test_an_assignment_that_is_cancelled_before_it_started_ends_at_once(world: AgentWorld) -> None:
    await world.start_agent()
    assignment = world.assignment(world.script())
    assignment.desired_state = node_pb2.DESIRED_STATE_CANCEL
    await world.scheduler.assign(assignment)
    finish = await world.scheduler.wait_for("finish")
    assert finish.WhichOneof("result") == "stopped"
    assert [kind for kind, _ in world.scheduler.reports] == ["finish"]
    assert world.children() == []


async def test_a_users_failure_pays_for_its_steps_and_is_not_tried_again(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4, checkpoint_every=2, fail_user_at_step=3)))
    failed = (await world.scheduler.wait_for("finish")).failed
    assert (failed.error.reason, failed.error.platform_fault, failed.retryable) == (
        "TRAINING_INPUT_INVALID",
        False,
        False,
    )
    assert failed.error.metadata["learning_rate"] == "lower it"
    assert world.scheduler.usage == [("train", 0, 2, 20), ("train", 2, 3, 10)]


async def test_memory_that_ran_out_is_told_and_the_run_goes_on(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4, checkpoint_every=2, out_of_memory_at_step=3)))
    assert (await world.scheduler.wait_for("finish")).succeeded.step == 4
    told = [warning for request in world.scheduler.of("progress") for warning in request.warnings]
    assert told == ["OUT_OF_MEMORY_RETRIED: out of memory at step 3"]
    assert world.scheduler.usage == ALL_USAGE


async def test_a_platform_failure_is_retryable(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(fail_platform_at_step=1)))
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.retryable
    assert failed.error.platform_fault


async def test_an_exit_without_a_result_is_a_platform_failure_with_its_last_words(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(exit_at_step=1)))
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.retryable
    assert failed.error.metadata["exit_code"] == "77"
    assert "last words of a fake child" in failed.error.metadata["last_words"]


async def test_garbage_from_a_child_kills_it(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(garbage_at_step=1)))
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.retryable
    assert "not JSON" in failed.error.message
    await wait_for_death(world.children()[0][0])


async def test_a_stop_that_nobody_asked_for_is_retried_and_its_partial_range_is_dropped(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4, checkpoint_every=2, stop_unasked_at_step=3)))
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.retryable
    assert world.scheduler.usage == [("train", 0, 2, 20)]


async def test_counts_that_differ_from_the_priced_ones_end_the_attempt(world: AgentWorld) -> None:
    await world.start_agent()
    assignment = world.assignment(world.script(steps=4, train_token_count=41))
    assignment.counts.training_tokens = 40
    await world.scheduler.assign(assignment)
    failed = (await world.scheduler.wait_for("finish")).failed
    assert not failed.retryable
    assert failed.error.platform_fault
    assert "41 training tokens instead of 40" in failed.error.message
    assert world.scheduler.usage == []


async def test_nothing_of_a_childs_group_outlives_it(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=4, hang_at_step=1, grandchild=True)))
    pid = await world.wait_for_child()
    group = os.getpgid(pid)
    os.kill(pid, signal.SIGKILL)
    failed = (await world.scheduler.wait_for("finish")).failed
    assert failed.retryable
    await eventually(lambda: not _group_is_alive(group))


async def test_whoever_holds_a_dead_childs_output_open_is_not_waited_for(world: AgentWorld) -> None:
    await world.start_agent(child_ending_s_max=0.5)
    await world.scheduler.assign(world.assignment(world.script(steps=4, kill_at_step=3, daemon=True)))
    failed = (await world.scheduler.wait_for("finish", timeout_s=30)).failed
    assert "signal 9" in failed.error.message
    await world.scheduler.assign(world.assignment(world.script(steps=2), token=8))
    assert (await world.scheduler.wait_for("finish", 2, timeout_s=30)).succeeded.step == 2


async def test_a_child_that_does_not_die_is_reported_and_its_device_set_aside(world: AgentWorld) -> None:
    # As a process in the kernel's uninterruptible sleep: no signal of the agent ends it.
    patch = "from chassis import spawn\nspawn._kill_group = lambda group: None\n"
    (world.folder / "sitecustomize.py").write_text(patch)
    await world.start_agent(child_ending_s_max=0.5, child_silence_s_max=1.0)
    await world.scheduler.assign(world.assignment(world.script(steps=4, hang_at_step=1)))
    failed = (await world.scheduler.wait_for("finish", timeout_s=30)).failed
    assert "does not die" in failed.error.message
    assert failed.retryable
    await world.scheduler.wait_until(lambda: len(world.scheduler.registrations) == 2)
    first, second = world.scheduler.registrations
    assert first.incarnation == second.incarnation
    assert [device.set_aside_reason for device in first.devices] == [""]
    assert "does not die" in second.devices[0].set_aside_reason


async def test_no_folder_is_left_after_an_attempt(world: AgentWorld) -> None:
    await world.start_agent()
    await world.scheduler.assign(world.assignment(world.script(steps=2)))
    await world.scheduler.wait_for("finish")
    await eventually(lambda: not list(world.work.iterdir()))


async def test_obsolete_checkpoints_are_deleted_and_nothing_outside_of_the_job(world: AgentWorld) -> None:
    await world.start_agent()
    mine = artifact_pb2.Artifact(
        key="jobs/proj_1/ft-1/checkpoints/1-3/", files=[world.put("jobs/proj_1/ft-1/checkpoints/1-3/", b"x", "a.json")]
    )
    foreign = artifact_pb2.Artifact(key="files/proj_2/", files=[world.put("files/proj_2/", b"x", "file-1")])
    world.scheduler.obsolete = [mine, foreign]
    await world.scheduler.assign(world.assignment(world.script(steps=2)))
    await world.scheduler.wait_for("finish")
    assert not [path for path in world.stored("jobs") if "/1-3/" in path]
    assert world.stored("files/proj_2") == ["files/proj_2/file-1"]


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _usage_comes_before_its_checkpoint(world: AgentWorld) -> None:
    told = 0
    for kind, request in world.scheduler.reports:
        if kind == "progress":
            told = max([told, *(entry.end_step for entry in request.usage)])
        if kind == "commit":
            assert request.checkpoint.step <= told
