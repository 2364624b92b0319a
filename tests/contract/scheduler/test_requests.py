"""What users ask and what they are told: quotes, refusals with every violation, idempotency, walls between projects."""

import asyncio
import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from chassis.errors import (
    AlreadyExists,
    DomainError,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from chassis.identity import acting_as
from chassis.rpc.channel import open_channel
from finemesh.artifacts.v1 import model_artifact_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2, tuning_limits_pb2, tuning_service_pb2, tuning_service_pb2_grpc
from tests.contract.scheduler.peers import AWAY, BASE
from tests.contract.scheduler.world import OWNER, STRANGER, World, running_world, state_name
from tests.harness.fixtures import SettingsFactory

_pb = tuning_service_pb2


async def quote(world: World, spec: tuning_job_pb2.TuningSpec) -> _pb.QuoteTuningJobResponse:
    with acting_as(OWNER):
        response: _pb.QuoteTuningJobResponse = await world.tuning.QuoteTuningJob(_pb.QuoteTuningJobRequest(spec=spec))
    return response


async def listed(world: World) -> int:
    with acting_as(OWNER):
        return len((await world.tuning.ListTuningJobs(_pb.ListTuningJobsRequest(page_size=1000))).tuning_jobs)


async def test_a_quote_is_what_the_job_is_held_at_and_counts_once(world: World) -> None:
    async with world.agent():
        spec = world.spec(hyperparameters=tuning_job_pb2.Hyperparameters(epochs=3))
        analyses = world.script.analyses
        quoted = await quote(world, spec)
        assert quoted.total_nanos_usd == 3_000_000
        assert quoted.available_nanos_usd == 77
        assert quoted.parameter_count == 1_000_000
        assert quoted.counts.training_tokens == 1000
        assert quoted.spec.hyperparameters.batch_size == 8
        assert sum(term.amount_nanos_usd for term in quoted.terms) == quoted.total_nanos_usd
        assert world.script.price_payers[-1] == "org_a"
        name = await world.create(spec)
        job = await world.when(name, lambda job: job.quoted_nanos_usd > 0)
        assert job.quoted_nanos_usd == quoted.total_nanos_usd
        assert job.counts == quoted.counts
        assert world.script.analyses == analyses + 1
        assert world.script.hold_keys[name] == "key_a"
        await world.cancel(name)


async def test_what_settings_come_to_is_told_with_the_quote_and_the_job(world: World) -> None:
    world.script.row_count, world.script.packed_sequence_count = 8, 1
    async with world.agent():
        spec = world.spec(hyperparameters=tuning_job_pb2.Hyperparameters(warmup_ratio=0.05))
        quoted = await quote(world, spec)
        assert (quoted.outlook.step_count, quoted.outlook.sequence_count) == (1, 1)
        assert [warning.field for warning in quoted.outlook.warnings] == ["spec.hyperparameters.batch_size"]
        # What is taken where nothing was said.
        assert quoted.spec.hyperparameters.learning_rate == 2e-4
        # A warning stops nobody, and stays with the job.
        name = await world.create(spec)
        job = await world.when(name, lambda job: job.quoted_nanos_usd > 0)
        assert job.outlook == quoted.outlook
        with acting_as(OWNER):
            lines = await world.tuning.ListTuningJobEvents(_pb.ListTuningJobEventsRequest(parent=name))
        assert any("mind spec.hyperparameters.batch_size" in event.message for event in lines.events)
        await world.cancel(name)
    world.script.row_count = world.script.packed_sequence_count = 0


async def test_early_stopping_that_can_end_nothing_is_refused_before_money_is_held(world: World) -> None:
    """Four evaluations of one step are one verdict, and two are needed."""
    world.script.row_count, world.script.packed_sequence_count = 8, 1
    async with world.agent():
        held_out = world.spec().training_file
        spec = world.spec(
            validation_file=held_out,
            hyperparameters=tuning_job_pb2.Hyperparameters(
                evaluations=4, early_stopping=tuning_job_pb2.EarlyStopping(patience=2)
            ),
        )
        with pytest.raises(InvalidArgument, match="does not fit its data") as refused:
            await quote(world, spec)
        assert [each.field for each in refused.value.violations] == ["spec.hyperparameters.early_stopping"]
        name = await world.create(spec)
        job = await world.when(name, lambda job: job.state == tuning_job_pb2.TUNING_JOB_STATE_FAILED)
        assert (job.error.reason, job.error.platform_fault) == ("INVALID_FIELD", False)
        assert "could never end the run" in job.error.message
        assert name not in world.script.hold_keys
    world.script.row_count = world.script.packed_sequence_count = 0


async def test_counts_of_other_code_are_never_quoted(world: World) -> None:
    """A node that tokenises by changed rules counts anew; what the earlier ones counted holds for them."""
    spec, counted = world.spec(), []
    for version, tokens in (("old", 1000), ("old", 1111), ("new", 2000), ("new", 2222), ("old", 3333)):
        world.script.preparation_version, world.script.token_count = version, tokens
        async with world.agent(preparation_version=version):
            counts = (await quote(world, spec)).counts
        counted.append(counts.training_tokens)
        assert counts.rows_per_second == 12.5
    world.script.preparation_version, world.script.token_count = "", 1000
    assert counted == [1000, 1000, 2000, 2000, 1000]


async def preview(world: World, **fields: Any) -> _pb.PreviewDatasetResponse:
    spec = world.spec()
    request = _pb.PreviewDatasetRequest(**{"file": spec.training_file, "base_model": spec.base_model, **fields})
    with acting_as(OWNER):
        response: _pb.PreviewDatasetResponse = await world.tuning.PreviewDataset(request)
    return response


async def test_a_preview_is_what_a_trainer_makes_of_the_file(world: World) -> None:
    async with world.agent():
        seen = await preview(world, train_on_inputs=tuning_job_pb2.TRAIN_ON_INPUTS_TRUE, row_count_max=7)
        assert (seen.preview.row_count, seen.preview.train_on_inputs) == (3, "true")
        asked = world.script.previews[-1]
        assert (asked.row_count_max, asked.base_model.key) == (7, "base/demo/rv_base/")
        # Left out, the longest row is what a job would cut at.
        assert asked.sequence_tokens_max == (await limits(world, BASE)).sequence_tokens_max_supervised == 2048
        await preview(world, sequence_tokens_max=64)
        assert world.script.previews[-1].sequence_tokens_max == 64
        assert asked.dataset.files[0].sha256 in world.script.files.values()
        world.script.analysis_error = InvalidArgument("DATASET_INVALID", "line 1: $")
        with pytest.raises(InvalidArgument) as refused:
            await preview(world)
        world.script.analysis_error = None
        assert refused.value.reason == "DATASET_INVALID"


async def test_a_preview_of_what_is_not_there_is_refused(world: World) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await preview(world, base_model="", row_count_max=51, tokens_shown_max=-1, sequence_tokens_max=-1)
    fields = [violation.field for violation in refused.value.violations]
    assert fields == ["base_model", "row_count_max", "tokens_shown_max", "sequence_tokens_max"]
    for sequence_tokens_max in (15, 10**9):
        with pytest.raises(InvalidArgument) as refused:
            await preview(world, sequence_tokens_max=sequence_tokens_max, row_count_max=51)
        assert [violation.field for violation in refused.value.violations] == ["row_count_max", "sequence_tokens_max"]
    # More than this very model takes, as a job would be told.
    with pytest.raises(InvalidArgument) as refused:
        await preview(world, sequence_tokens_max=2049)
    (violation,) = refused.value.violations
    assert violation.field == "sequence_tokens_max"
    assert "at most 2048" in violation.description
    with pytest.raises(NotFound) as unknown:
        await preview(world, base_model="finemesh/none")
    assert (unknown.value.reason, [each.field for each in unknown.value.violations]) == (
        "MODEL_UNKNOWN",
        ["base_model"],
    )
    with pytest.raises(NotFound) as unknown:
        await preview(world, file="projects/proj_a/files/gone")
    assert [violation.field for violation in unknown.value.violations] == ["file"]
    with pytest.raises(NotFound):
        await preview(world, file="projects/proj_stranger/files/file-1")


async def test_every_violation_of_a_spec_at_once_and_nothing_stored(world: World) -> None:
    before = await listed(world)
    spec = world.spec(
        output_name="Not Good",
        lora=tuning_job_pb2.LoraTraining(rank=1000),
        hyperparameters=tuning_job_pb2.Hyperparameters(epochs=-1, learning_rate=float("nan"), batch_size=10**9),
    )
    with pytest.raises(InvalidArgument) as refused:
        await world.create(spec)
    assert {violation.field for violation in refused.value.violations} == {
        "spec.output_name",
        "spec.lora.rank",
        "spec.hyperparameters.epochs",
        "spec.hyperparameters.learning_rate",
        "spec.hyperparameters.batch_size",
    }
    assert await listed(world) == before


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (model_artifact_service_pb2.MODEL_NAME_USE_ENDPOINT, "an endpoint"),
        (model_artifact_service_pb2.MODEL_NAME_USE_TUNED_MODEL, "a tuned model"),
        (model_artifact_service_pb2.MODEL_NAME_USE_BASE_MODEL, "a base model"),
    ],
)
async def test_a_job_whose_model_could_not_have_its_name_is_refused_before_anything_is_held(
    world: World, use: "model_artifact_service_pb2.ModelNameUse.ValueType", what: str
) -> None:
    before = await listed(world)
    world.script.taken_names = {"team/bot": use}
    with pytest.raises(AlreadyExists) as refused:
        await world.create(world.spec(output_name="bot"))
    assert refused.value.reason == "ALREADY_EXISTS"
    assert [violation.field for violation in refused.value.violations] == ["spec.output_name"]
    assert f"team/bot is {what} already" in refused.value.message
    assert "choose another output_name" in refused.value.message
    # What is not stored is not held.
    assert await listed(world) == before
    # The request that made a job is answered with that job, whatever its name means now.
    world.script.taken_names = {}
    spec = world.spec(output_name=f"bot-{use}")
    name = await world.create(spec, request_id=f"names-{use}")
    world.script.taken_names = {f"team/{spec.output_name}": use}
    assert await world.create(spec, request_id=f"names-{use}") == name
    world.script.taken_names = {}


async def test_an_older_inference_that_knows_no_names_refuses_no_job(world: World) -> None:
    world.script.knows_names = False
    name = await world.create(world.spec(output_name="bot-of-old"))
    world.script.knows_names = True
    assert (await world.get(name)).spec.output_name == "bot-of-old"


async def limits(world: World, model: str) -> tuning_limits_pb2.TuningLimits:
    with acting_as(OWNER):
        return (await world.tuning.GetTuningLimits(_pb.GetTuningLimitsRequest(model=model))).limits


async def test_the_limits_of_a_model_are_told_and_kept(world: World) -> None:
    """Those of the bound are taken, the next value is refused: what is told is what holds."""
    told = await limits(world, BASE)
    assert told.base_model == BASE
    assert (told.epochs_max, told.evaluations_max, told.checkpoints_max) == (100, 100, 100)
    assert (told.learning_rate_min, told.learning_rate_max) == (0, 1)
    assert (told.sequence_tokens_min, told.sequence_tokens_max_supervised, told.sequence_tokens_max_dpo) == (
        16,
        2048,
        2048,
    )
    assert (told.gradient_accumulation_steps_max, told.gradient_accumulation_steps_default) == (256, 1)
    assert (told.lora.rank_default, told.lora.rank_max, told.lora.alpha_max, told.lora.dropout_max) == (
        16,
        64,
        1024,
        0.9,
    )
    assert list(told.lora.target_modules) == ["all-linear"]
    assert (told.lora.batch.min, told.lora.batch.max_supervised, told.lora.batch.max_dpo) == (1, 1024, 512)
    assert (told.full.batch.max_supervised, told.supports_dpo) == (1024, True)
    before = await listed(world)
    for spec, field in (
        (world.spec(lora={"rank": told.lora.rank_max + 1}), "spec.lora.rank"),
        (
            world.spec(hyperparameters={"batch_size": told.lora.batch.max_supervised + 1}),
            "spec.hyperparameters.batch_size",
        ),
        (world.spec(hyperparameters={"sequence_tokens_max": 2049}), "spec.hyperparameters.sequence_tokens_max"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await world.create(spec)
        assert [violation.field for violation in refused.value.violations] == [field]
    assert await listed(world) == before


async def test_limits_say_what_the_template_renders_as_soon_as_a_node_can_tell(world: World) -> None:
    """The other limits are told without it. What was told once of a revision is not asked again."""
    world.script.base_revision = "rv_described"
    try:
        async with world.agent():
            world.script.analysis_error = AWAY
            told = await limits(world, BASE)
            assert (told.epochs_max, told.HasField("supports_tools"), told.HasField("supports_reasoning")) == (
                100,
                False,
                False,
            )
            world.script.analysis_error = None
            told = await limits(world, BASE)
            assert (told.supports_tools, told.HasField("supports_reasoning"), told.supports_reasoning) == (
                True,
                True,
                False,
            )
            asked = len(world.script.descriptions)
            assert await limits(world, BASE) == told
            assert len(world.script.descriptions) == asked
    finally:
        world.script.base_revision, world.script.analysis_error = "rv_base", None


@pytest.mark.parametrize(("description_deadline_s", "timeout_s"), [(0.5, 60.0), (600.0, 6.0)])
async def test_limits_wait_for_silent_trainers_once_and_not_for_long(
    make_settings: SettingsFactory, tmp_path: Path, description_deadline_s: float, timeout_s: float
) -> None:
    """However many they are, and well within the time that the caller has."""
    overrides = {"description_deadline_s": description_deadline_s, "description_retry_s": 600.0}
    async with running_world(make_settings, tmp_path / "port", **overrides) as world:
        world.script.is_silent = True
        async with world.agent(node="silent-1"), world.agent(node="silent-2"), world.agent(node="silent-3"):
            for _ in range(2):
                with acting_as(OWNER):
                    request = _pb.GetTuningLimitsRequest(model=BASE)
                    told = (await world.tuning.GetTuningLimits(request, timeout=timeout_s)).limits
                assert (told.epochs_max, told.HasField("supports_tools")) == (100, False)
                assert len(world.script.descriptions) == 1


async def test_the_limits_of_what_a_run_would_continue_are_those_of_its_base(world: World) -> None:
    """Also while the job runs: one of its checkpoints may be continued."""
    async with world.agent():
        name = await world.create(world.spec(output_name="limited"))
        job = await world.when(name, lambda job: job.quoted_nanos_usd > 0)
        for model in (name, name.rpartition("/")[2], f"{name}:5", job.output_model):
            assert await limits(world, model) == await limits(world, BASE), model
        await world.cancel(name)
    with pytest.raises(InvalidArgument):
        await limits(world, "")
    for unknown in ("nobody/knows", "ft-none", "ft-none:5", "unknown", "projects/proj_b/tuningJobs/ft-1"):
        with pytest.raises(NotFound, match="model: ") as refused:
            await limits(world, unknown)
        assert [violation.field for violation in refused.value.violations] == ["model"]


@pytest.mark.parametrize(
    ("field", "value", "kind", "reason"),
    [
        ("base_model", "nobody/knows", NotFound, "MODEL_UNKNOWN"),
        ("training_file", "projects/proj_a/files/gone", NotFound, "NOT_FOUND"),
        ("training_file", "projects/proj_b/files/theirs", NotFound, "NOT_FOUND"),
        ("validation_file", "projects/proj_a/files/gone", NotFound, "NOT_FOUND"),
        ("training_file", "not a name", InvalidArgument, "INVALID_FIELD"),
    ],
)
async def test_bad_references_are_refused_at_once(
    world: World, field: str, value: str, kind: type[DomainError], reason: str
) -> None:
    before = await listed(world)
    spec = world.spec()
    setattr(spec, field, value)
    with pytest.raises(kind) as refused:
        await world.create(spec)
    assert refused.value.reason == reason
    assert f"spec.{field}" in refused.value.message
    assert await listed(world) == before


async def test_a_job_larger_than_any_node_is_refused(world: World) -> None:
    async with world.agent(devices=2):
        with pytest.raises(FailedPrecondition) as refused:
            await world.create(world.spec(gpu_count=64))
        assert refused.value.reason == "JOB_TOO_LARGE"
        assert refused.value.metadata["requested"] == "64 GPUs on at most 16 nodes"
        assert refused.value.metadata["largest"].startswith("2 of type cpu")
        with pytest.raises(FailedPrecondition):
            await quote(world, world.spec(gpu_count=64))


async def test_the_same_request_makes_one_job(world: World) -> None:
    spec = world.spec()
    names = await asyncio.gather(*(world.create(spec, "same-1") for _ in range(5)))
    assert len(set(names)) == 1
    changed = tuning_job_pb2.TuningSpec()
    changed.CopyFrom(spec)
    changed.hyperparameters.epochs = 7
    with pytest.raises(AlreadyExists) as refused:
        await world.create(changed, "same-1")
    assert refused.value.reason == "REQUEST_ID_REUSED"
    await world.cancel(names[0])
    assert await world.create(spec, "same-1") == names[0]


async def test_a_taken_output_name_is_named(world: World) -> None:
    name = await world.create(world.spec(output_name="taken"))
    with pytest.raises(AlreadyExists) as refused:
        await world.create(world.spec(output_name="taken"))
    assert refused.value.reason == "ALREADY_EXISTS"
    assert refused.value.violations[0].field == "spec.output_name"
    await world.cancel(name)
    await world.until(name, "CANCELLED")
    await world.cancel(await world.create(world.spec(output_name="taken")))


async def test_a_foreign_project_is_a_wall(world: World) -> None:
    name = await world.create()
    with pytest.raises(NotFound):
        await world.get(name, STRANGER)
    with pytest.raises(NotFound):
        await world.cancel(name, STRANGER)
    with acting_as(STRANGER):
        for call, request in (
            (world.tuning.ListTuningJobEvents, _pb.ListTuningJobEventsRequest(parent=name)),
            (world.tuning.ListCheckpoints, _pb.ListCheckpointsRequest(parent=name)),
            (world.tuning.ListTuningJobs, _pb.ListTuningJobsRequest(parent="projects/proj_a")),
            (world.tuning.CreateTuningJob, _pb.CreateTuningJobRequest(parent="projects/proj_a", spec=world.spec())),
        ):
            with pytest.raises(NotFound):
                await call(request)
        with pytest.raises(NotFound):
            async for _ in world.tuning.WatchTuningJob(_pb.WatchTuningJobRequest(name=name)):
                pass
        assert (await world.tuning.ListTuningJobs(_pb.ListTuningJobsRequest())).tuning_jobs == []
    theirs = name.replace("proj_a", "proj_b")
    with pytest.raises(NotFound):
        await world.get(theirs, STRANGER)
    await world.cancel(name)


async def test_jobs_are_listed_in_pages(world: World) -> None:
    names = [await world.create() for _ in range(3)]
    found: list[str] = []
    token = ""
    with acting_as(OWNER):
        while True:
            page = await world.tuning.ListTuningJobs(_pb.ListTuningJobsRequest(page_size=2, page_token=token))
            found += [job.name for job in page.tuning_jobs]
            token = page.next_page_token
            if not token:
                break
        with pytest.raises(InvalidArgument):
            await world.tuning.ListTuningJobs(_pb.ListTuningJobsRequest(page_token="bogus"))
    assert found[:3] == list(reversed(names))
    assert len(found) == len(set(found))
    for name in names:
        await world.cancel(name)


@pytest.mark.parametrize("sequence", [2**63, -(2**63) - 1, 10**30])
async def test_a_forged_page_token_reaches_no_query(world: World, sequence: int) -> None:
    """As tokens once were: a digest that anybody can compute, and a cursor of anybody's choice."""
    name = await world.create()
    digest = hashlib.sha256(f"tuningJobEvents:{name.rpartition('/')[2]}".encode()).hexdigest()[:12]
    forged = base64.urlsafe_b64encode(json.dumps([digest, sequence], separators=(",", ":")).encode()).decode()
    with acting_as(OWNER), pytest.raises(InvalidArgument) as refused:
        request = _pb.ListTuningJobEventsRequest(parent=name, page_token=forged.rstrip("="))
        await world.tuning.ListTuningJobEvents(request)
    assert [violation.field for violation in refused.value.violations] == ["page_token"]
    await world.cancel(name)


async def test_too_little_credit_fails_the_job_with_the_shortfall(world: World) -> None:
    world.script.hold_error = FailedPrecondition(
        "BALANCE_INSUFFICIENT", "the balance lacks $1.00; add credit", metadata={"shortfall_nanos_usd": "1000000000"}
    )
    async with world.agent():
        job = await world.until(await world.create(), "FAILED")
    assert job.error.reason == "BALANCE_INSUFFICIENT"
    assert job.error.metadata["shortfall_nanos_usd"] == "1000000000"
    assert not job.error.platform_fault


async def test_faulty_lines_fail_the_job_and_are_named(world: World) -> None:
    world.script.analysis_error = InvalidArgument(
        "DATASET_INVALID",
        "the dataset has errors",
        violations=[FieldViolation("line 12: $.messages[0].role", "must be system, user or assistant")],
    )
    async with world.agent():
        job = await world.until(await world.create(), "FAILED")
        with pytest.raises(InvalidArgument) as refused:
            await quote(world, world.spec())
    assert job.error.reason == "DATASET_INVALID"
    assert "line 12: $.messages[0].role: must be system, user or assistant" in job.error.message
    assert refused.value.violations[0].field == "line 12: $.messages[0].role"


@pytest.mark.parametrize("which", ["trainer", "billing", "defect"])
async def test_a_peer_that_is_away_is_waited_for(world: World, which: str) -> None:
    if which == "trainer":
        world.script.analysis_error = AWAY
    else:
        world.script.hold_error = AWAY if which == "billing" else Internal("INTERNAL", "a defect")
    async with world.agent() as agent:
        name = await world.create()
        waiting = await world.when(name, lambda job: "waits for" in job.queue.waiting_for)
        assert state_name(waiting) == "VALIDATING"
        world.script.analysis_error = world.script.hold_error = None
        job = await world.until(name, "QUEUED", "STARTING")
        assert "waits for" not in job.queue.waiting_for
        assignment = await agent.assignment()
        await world.cancel(name)
        await agent.stop(assignment, 0)
        await world.until(name, "CANCELLED")


async def test_a_hold_whose_answer_came_too_late_is_released(world: World) -> None:
    world.script.hold_error = AWAY
    async with world.agent():
        name = await world.create()
        await world.when(name, lambda job: "waits for billing" in job.queue.waiting_for)
        await world.cancel(name)
        await world.script.until(lambda: name in world.script.released)


async def test_a_quote_without_a_trainer_says_so(world: World) -> None:
    world.script.analysis_error = AWAY
    with pytest.raises(Unavailable):
        await quote(world, world.spec())


async def test_only_the_gateway_may_speak_for_users(world: World) -> None:
    channel = open_channel(world.make_settings("trainer"), world.target, "scheduler")
    stub = tuning_service_pb2_grpc.TuningServiceStub(channel)
    with pytest.raises(PermissionDenied), acting_as(OWNER):
        await stub.ListTuningJobs(_pb.ListTuningJobsRequest())
    await channel.close()
