"""The life of a job over the wire: from the request to the model, and every way in which it can end otherwise."""

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from chassis.clock import SystemClock
from chassis.errors import Aborted, FailedPrecondition, InvalidArgument
from chassis.identity import acting_as
from chassis.rpc.channel import open_channel
from finemesh.events.v1 import tuning_events_pb2
from finemesh.nodes.v1 import node_service_pb2, node_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_event_pb2, tuning_job_pb2, tuning_service_pb2
from services.trainer.attempt.reporter import Reporter
from services.trainer.attempt.run_view import ProgressReport
from services.trainer.config import TrainerSettings
from tests.contract.scheduler.agent import WAIT_S_MAX
from tests.contract.scheduler.peers import AWAY
from tests.contract.scheduler.world import OWNER, World, state_name


async def ended(world: World, name: str) -> tuning_events_pb2.TuningJobEnded:
    """The one event that says that the job is over."""
    connection = await asyncpg.connect(world.settings.database_url)
    try:
        rows = await connection.fetch(
            "SELECT payload FROM outbox WHERE subject = 'tuning.job.ended' AND headers::jsonb ->> 'ce-subject' = $1",
            name,
        )
    finally:
        await connection.close()
    (row,) = rows
    return tuning_events_pb2.TuningJobEnded.FromString(row["payload"])


async def ending(world: World, name: str) -> str:
    event = await ended(world, name)
    return tuning_events_pb2.TuningJobEnding.Name(event.ending).removeprefix("TUNING_JOB_ENDING_")


async def history(world: World, name: str) -> list[tuning_job_event_pb2.TuningJobEvent]:
    request = tuning_service_pb2.ListTuningJobEventsRequest(parent=name, page_size=1000)
    found: list[tuning_job_event_pb2.TuningJobEvent] = []
    with acting_as(OWNER):
        while True:
            page = await world.tuning.ListTuningJobEvents(request)
            found += page.events
            request.page_token = page.next_page_token
            if not request.page_token:
                return found


async def test_from_create_to_succeeded(world: World) -> None:
    async with world.agent() as agent:
        name = await world.create()
        assignment = await agent.assignment()
        assert assignment.lease.tuning_job == name
        assert assignment.lease.attempt == 1
        assert assignment.spec.lora.rank == 16
        assert assignment.counts.training_tokens == 1000
        assert assignment.base_revision == "rv_base"
        assert list(assignment.device_indices) == [0]
        assert not assignment.HasField("resume_from")
        await agent.start(assignment)
        await agent.progress(assignment, 0, 10)
        await agent.checkpoint(assignment, 10)
        await agent.progress(assignment, 10, 20)
        running = await world.get(name)
        assert state_name(running) == "RUNNING"
        assert running.progress.step == 20
        await agent.succeed(assignment)
        job = await world.until(name, "SUCCEEDED")
        await agent.idle()
    assert job.output_model == f"team/{job.spec.output_name}"
    assert job.output_revision == "rv_tuned"
    assert job.quoted_nanos_usd == 1_000_000
    assert job.hold_id.startswith("hold_")
    assert job.attempt_count == 1
    for moment in ("create_time", "queue_time", "start_time", "end_time", "update_time"):
        assert job.HasField(moment)
    event = await ended(world, name)
    assert event.ending == tuning_events_pb2.TUNING_JOB_ENDING_COMPLETED
    assert event.usage_record_count == 2
    assert event.organization_id == "org_a"
    assert event.model.model_id == job.output_model
    with acting_as(OWNER):
        checkpoints = await world.tuning.ListCheckpoints(tuning_service_pb2.ListCheckpointsRequest(parent=name))
        events = await world.tuning.ListTuningJobEvents(tuning_service_pb2.ListTuningJobEventsRequest(parent=name))
    assert [each.step for each in checkpoints.checkpoints] == [10]
    assert [each.sequence for each in events.events] == list(range(1, len(events.events) + 1))
    states = [each.state for each in events.events if each.kind == 1]
    assert states == sorted(states)


async def test_the_folder_of_an_ended_job_is_handed_out_until_it_is_cleaned(world: World) -> None:
    async with world.agent(node="cleaning") as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        await agent.checkpoint(assignment, 10)
        await agent.succeed(assignment)
        await world.until(name, "SUCCEEDED")
        connection = await asyncpg.connect(world.settings.database_url)
        await connection.execute("UPDATE job_folders SET ended_at = now() - interval '40 days'")
        await connection.close()
        claim = node_service_pb2.ClaimJobFoldersRequest(node="cleaning")
        for checkpoints in (1, 0):
            answer = await agent.stub.ClaimJobFolders(claim, timeout=WAIT_S_MAX)
            (folder,) = [each for each in answer.folders if each.tuning_job == name]
            assert assignment.checkpoint_key_prefix.startswith(folder.key_prefix)
            assert folder.model.key.startswith(folder.key_prefix)
            assert len(folder.checkpoints) == checkpoints
            done = node_service_pb2.FinishJobFolderRequest(node="cleaning", tuning_job=name, claim=folder.claim)
            for _ in range(2):
                await agent.stub.FinishJobFolder(done, timeout=WAIT_S_MAX)
        answer = await agent.stub.ClaimJobFolders(claim, timeout=WAIT_S_MAX)
        assert name not in [each.tuning_job for each in answer.folders]


async def test_a_warning_of_the_run_is_an_event_of_the_job_once(world: World) -> None:
    """Also when the next attempt meets it again."""
    warning = "OUT_OF_MEMORY_RETRIED: out of memory at step 3: micro-batches have at most 256 tokens from here on"
    async with world.agent() as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        for _ in range(2):
            await agent.stub.ReportProgress(
                node_service_pb2.ReportProgressRequest(
                    lease_token=assignment.lease.token, tuning_job=name, warnings=[warning]
                )
            )
        await agent.succeed(assignment)
        await world.until(name, "SUCCEEDED")
    with acting_as(OWNER):
        events = await world.tuning.ListTuningJobEvents(tuning_service_pb2.ListTuningJobEventsRequest(parent=name))
    kind = tuning_job_event_pb2.TUNING_JOB_EVENT_KIND_WARNING
    assert [event.message for event in events.events if event.kind == kind] == [warning]


async def test_a_report_is_bounded_and_a_longer_range_arrives_in_parts_each_step_once(world: World) -> None:
    """Told by the agent's own reporter; the answer to every other part is lost, so it is told again."""
    steps = world.settings.report_entries_max + 100
    metrics = [
        tuning_job_pb2.TuningProgress(step=step, step_count=steps, training_loss=1.0) for step in range(1, steps + 1)
    ]
    usage = [node_service_pb2.TrainingUsage(kind="train", start_step=0, end_step=steps, tokens=7)]
    calls = itertools.count()
    async with world.agent() as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        whole = node_service_pb2.ReportProgressRequest(
            lease_token=assignment.lease.token, tuning_job=name, metrics=metrics, usage=usage
        )
        with pytest.raises(InvalidArgument):
            await agent.stub.ReportProgress(whole)

        async def report(request: node_service_pb2.ReportProgressRequest, *, timeout: float) -> object:
            answer = await agent.stub.ReportProgress(request, timeout=timeout)
            if next(calls) % 2:
                raise AWAY
            return answer

        stub: Any = SimpleNamespace(ReportProgress=report, FinishAttempt=agent.stub.FinishAttempt)
        settings = TrainerSettings(report_interval_s=0, report_backoff_s_max=0.1)
        reporter = Reporter(stub, assignment.lease, settings, SystemClock())
        await reporter.progress(ProgressReport(metrics=metrics, usage=usage, warnings=["told once"]))
        await reporter.finished(node_service_pb2.AttemptStopped(step=steps))
        await world.cancel(name)
        await reporter.run()
        job = await world.until(name, "CANCELLED")
    assert job.progress.step == steps
    assert (await ended(world, name)).usage_record_count == 1
    events = await history(world, name)
    assert [event.progress.step for event in events if event.HasField("progress")] == list(range(1, steps + 1))
    assert [event.message for event in events].count("told once") == 1


async def test_a_lost_node_hands_its_job_on_with_the_last_checkpoint(world: World) -> None:
    async with world.agent(node="n-lost", incarnation="a") as first:
        name = await world.create()
        old = await first.assignment()
        await first.start(old)
        await first.progress(old, 0, 10)
        await first.checkpoint(old, 10)
        await first.progress(old, 10, 15)
        await first.crash()
        async with world.agent(node="n-next") as second:
            new = await second.assignment()
            assert new.lease.tuning_job == name
            assert new.lease.attempt == 2
            assert new.lease.token > old.lease.token
            assert new.resume_from.step == 10
            await second.start(new)
            with pytest.raises(Aborted) as refused:
                await first.progress(old, 15, 20)
            assert refused.value.reason == "LEASE_STALE"
            await second.progress(new, 10, 15)
            await second.progress(new, 15, 20)
            await second.succeed(new)
            job = await world.until(name, "SUCCEEDED")
    assert job.attempt_count == 2
    assert (await ended(world, name)).usage_record_count == 3


async def test_a_node_that_starts_anew_loses_its_leases_at_once(world: World) -> None:
    async with world.agent(incarnation="a") as first:
        name = await world.create()
        old = await first.assignment()
        await first.start(old)
        async with world.agent(incarnation="b") as second:
            new = await second.assignment()
            assert new.lease.attempt == 2
            error = await first.heartbeat_error()
            assert isinstance(error, Aborted)
            await second.start(new)
            await second.succeed(new)
            await world.until(name, "SUCCEEDED")


async def test_registering_again_under_the_same_incarnation_keeps_the_lease(world: World) -> None:
    async with world.agent(incarnation="same") as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        await agent.register()
        await agent.progress(assignment, 0, 10)
        await agent.succeed(assignment)
        assert (await world.until(name, "SUCCEEDED")).attempt_count == 1


async def test_a_lease_that_is_not_renewed_ends_though_the_node_lives(world: World) -> None:
    async with world.agent() as agent:
        name = await world.create()
        old = await agent.assignment()
        await agent.start(old)
        agent.working = False
        await world.when(name, lambda job: job.attempt_count == 2)
        agent.working = True
        new = await agent.assignment(after=old)
        assert new.lease.token > old.lease.token
        await agent.start(new)
        await agent.succeed(new)
        await world.until(name, "SUCCEEDED")


async def test_cancel_while_validating(world: World) -> None:
    world.script.analysis_error = AWAY
    name = await world.create()
    waiting = await world.when(name, lambda job: "waits for a trainer" in job.queue.waiting_for)
    assert state_name(waiting) == "VALIDATING"
    job = await world.cancel(name)
    assert state_name(job) == "CANCELLED"
    assert await ending(world, name) == "CANCELLED_BEFORE_RUN"
    assert state_name(await world.cancel(name)) == "CANCELLED"


async def test_cancel_while_queued(world: World) -> None:
    async with world.agent() as agent:
        first = await world.create()
        assignment = await agent.assignment()
        second = await world.create()
        queued = await world.until(second, "QUEUED")
        assert queued.queue.position == 1
        assert queued.queue.waiting_for == "1 GPU on one node; 0 of 1 free on n1"
        assert state_name(await world.cancel(second)) == "CANCELLED"
        assert await ending(world, second) == "CANCELLED_BEFORE_RUN"
        await agent.start(assignment)
        await agent.succeed(assignment)
        await world.until(first, "SUCCEEDED")


async def test_cancel_while_starting(world: World) -> None:
    async with world.agent() as agent:
        name = await world.create()
        assignment = await agent.assignment()
        assert state_name(await world.cancel(name)) == "CANCELLING"
        await agent.assignment(cancelled=True)
        await agent.stop(assignment, 0)
        await world.until(name, "CANCELLED")
        await agent.idle()
    assert await ending(world, name) == "CANCELLED_BEFORE_RUN"


async def test_cancel_while_running(world: World) -> None:
    async with world.agent() as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        await agent.progress(assignment, 0, 5)
        assert state_name(await world.cancel(name)) == "CANCELLING"
        assert state_name(await world.cancel(name)) == "CANCELLING"
        await agent.assignment(cancelled=True)
        await agent.progress(assignment, 5, 7)
        await agent.stop(assignment, 7)
        await world.until(name, "CANCELLED")
    event = await ended(world, name)
    assert event.ending == tuning_events_pb2.TUNING_JOB_ENDING_CANCELLED_RUNNING
    assert event.usage_record_count == 2


async def test_a_cancelled_job_whose_node_is_lost_is_cancelled(world: World) -> None:
    async with world.agent(node="n-cancel") as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        await world.cancel(name)
        await agent.crash()
        await world.until(name, "CANCELLED")


async def test_cancel_after_the_end_is_a_conflict(world: World) -> None:
    async with world.agent() as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        await agent.succeed(assignment)
        await world.until(name, "SUCCEEDED")
    with pytest.raises(FailedPrecondition) as refused:
        await world.cancel(name)
    assert refused.value.reason == "STATE_CONFLICT"


async def test_the_users_failure_ends_the_job(world: World) -> None:
    async with world.agent() as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        error = tuning_job_pb2.JobError(reason="TRAINING_INPUT_INVALID", message="the loss is not a number")
        await agent.fail(assignment, error, retryable=False)
        job = await world.until(name, "FAILED")
    assert (job.error.reason, job.error.platform_fault) == ("TRAINING_INPUT_INVALID", False)
    assert await ending(world, name) == "USER_FAILURE"


async def test_our_failure_is_tried_again(world: World) -> None:
    async with world.agent() as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        error = tuning_job_pb2.JobError(reason="TRAINING_FAILED", message="killed", platform_fault=True)
        await agent.fail(assignment, error, retryable=True)
        await world.when(name, lambda job: job.attempt_count == 2)
        again = await agent.assignment(after=assignment)
        await agent.start(again)
        await agent.succeed(again)
        await world.until(name, "SUCCEEDED")


async def test_a_torn_checkpoint_is_passed_over_for_the_one_before_and_the_job_says_why(world: World) -> None:
    async with world.agent() as agent:
        name = await world.create()
        first = await agent.assignment()
        await agent.start(first)
        for step in (5, 10):
            await agent.checkpoint(first, step)
        error = tuning_job_pb2.JobError(reason="DATA_CORRUPT", message="state.json is missing", platform_fault=True)
        bad = node_service_pb2.BadCheckpoint(step=10, manifest_sha256="sha-10")
        failed = node_service_pb2.AttemptFailed(error=error, retryable=True, bad_checkpoint=bad)
        await agent.finish(first, failed=failed)
        second = await agent.assignment(after=first)
        assert second.resume_from.step == 5
        (warning,) = [event.message for event in await history(world, name) if "cannot be used" in event.message]
        assert "state.json is missing" in warning
        await agent.start(second)
        await agent.succeed(second)
        await world.until(name, "SUCCEEDED")


async def test_a_job_whose_hold_is_over_ends_as_the_platforms_failure(world: World) -> None:
    async with world.agent() as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        waiting = await world.create()
        await world.until(waiting, "QUEUED")
        world.script.renewal_error = AWAY
        world.script.ended_holds |= {name, waiting}
        # Nobody is judged while billing is away.
        await world.script.until(lambda: world.script.renewals_refused >= 2)
        assert state_name(await world.get(name)) == "RUNNING"
        world.script.renewal_error = None
        jobs = [await world.until(each, "FAILED") for each in (name, waiting)]
        await agent.idle()
        with pytest.raises(Aborted) as stale:
            await agent.progress(assignment, 0, 10)
    assert stale.value.reason == "LEASE_STALE"
    for job in jobs:
        assert (job.error.reason, job.error.platform_fault) == ("HOLD_EXPIRED", True)
        assert await ending(world, job.name) == "PLATFORM_FAILURE"


async def test_a_watch_goes_on_where_it_was_cut_off(world: World) -> None:
    async with world.agent() as agent:
        name = await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        await agent.progress(assignment, 0, 5)
        seen: list[int] = []
        with acting_as(OWNER):
            stream = world.tuning.WatchTuningJob(tuning_service_pb2.WatchTuningJobRequest(name=name))
        async with asyncio.timeout(WAIT_S_MAX):
            async for response in stream:
                seen += [event.sequence for event in response.events]
                if len(seen) >= 6:
                    break
        await agent.progress(assignment, 5, 10)
        await agent.succeed(assignment)
        with acting_as(OWNER):
            rest = world.tuning.WatchTuningJob(
                tuning_service_pb2.WatchTuningJobRequest(name=name, after_sequence=seen[-1])
            )
        last = None
        async with asyncio.timeout(WAIT_S_MAX):
            async for response in rest:
                seen += [event.sequence for event in response.events]
                last = response.tuning_job
    assert seen == list(range(1, len(seen) + 1))
    assert last is not None
    assert state_name(last) == "SUCCEEDED"


async def test_files_under_foreign_keys_are_refused(world: World) -> None:
    async with world.agent() as agent:
        await world.create()
        assignment = await agent.assignment()
        await agent.start(assignment)
        own = assignment.checkpoint_key_prefix
        assignment.checkpoint_key_prefix = "jobs/proj_b/ft-x/checkpoints/"
        with pytest.raises(Exception, match="must begin with"):
            await agent.checkpoint(assignment, 5)
        assignment.checkpoint_key_prefix = own + "../../"
        with pytest.raises(Exception, match="must begin with"):
            await agent.checkpoint(assignment, 5)
        assignment.model_key_prefix = "models/proj_b/"
        with pytest.raises(Exception, match="must begin with"):
            await agent.succeed(assignment)
        await agent.fail(assignment, tuning_job_pb2.JobError(reason="TRAINING_FAILED", message="x"), retryable=False)


async def test_an_unregistered_node_is_told_so(world: World) -> None:
    async with open_channel(world.node_settings("unknown"), world.agents_target, "scheduler") as channel:
        stream = node_service_pb2_grpc.NodeServiceStub(channel).Heartbeat(
            iter([node_service_pb2.HeartbeatRequest(node="unknown", incarnation="x")]), timeout=WAIT_S_MAX
        )
        with pytest.raises(Aborted):
            async for _ in stream:
                pass
