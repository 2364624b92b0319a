"""The byte proxy over real servers: identity, errors, streams, deadlines, and what does not pass."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from chassis import errors
from chassis.errors import FieldViolation, InvalidArgument, Unavailable
from finemesh.billing.v1 import billing_service_pb2
from finemesh.billing.v1.billing_service_pb2_grpc import BillingServiceStub
from finemesh.inference.v1 import generation_pb2, inference_service_pb2
from finemesh.models.v1 import model_service_pb2
from finemesh.tuning.v1 import tuning_service_pb2
from services.gateway.identity import keys
from tests.contract.gateway.world import World, gateway_world, refused
from tests.harness.raw_calls import raw_call

JOB = tuning_service_pb2.GetTuningJobRequest(name="projects/p/tuningJobs/ft-1")


async def test_a_call_arrives_with_the_identity_of_its_key(world: World):
    answer = await world.jobs.GetTuningJob(JOB, metadata=world.bearer())
    assert answer.tuning_job.name == JOB.name
    caller = world.tuning.caller
    assert caller is not None
    assert (caller.service, caller.namespace) == ("gateway", "acme")
    assert (caller.tenant, caller.account) == (world.acme.project_id, world.acme.organization_id)
    assert caller.subject.startswith("key_")
    assert caller.roles == {"member", "admin", "operator"}


async def test_identity_cannot_be_forged(world: World):
    forged = (
        ("x-finemesh-tenant", world.other.project_id),
        ("x-finemesh-account", world.other.organization_id),
        ("x-finemesh-roles", "operator"),
        ("x-finemesh-namespace", "other"),
        ("x-finemesh-subject", "key_other"),
    )
    await world.jobs.GetTuningJob(JOB, metadata=(*world.bearer(), *forged))
    assert world.tuning.caller is not None
    assert (world.tuning.caller.tenant, world.tuning.caller.namespace) == (world.acme.project_id, "acme")
    async with refused("API_KEY_MISSING"):
        await world.jobs.GetTuningJob(JOB, metadata=forged)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "API_KEY_MISSING"),
        ((("authorization", "Bearer nonsense"),), "API_KEY_INVALID"),
        ((("authorization", f"Bearer {keys.new_secret()}"),), "API_KEY_INVALID"),
    ],
)
async def test_without_a_key_nothing_passes(world: World, metadata, reason):
    calls: tuple[Awaitable[object], ...] = (
        world.jobs.GetTuningJob(JOB, metadata=metadata),
        world.jobs.WatchTuningJob(tuning_service_pb2.WatchTuningJobRequest(), metadata=metadata).read(),
    )
    for call in calls:
        async with refused(reason, "UNAUTHENTICATED"):
            await call
    assert world.tuning.caller is None


async def test_a_typed_error_passes_unchanged(world: World):
    error = InvalidArgument(
        "INVALID_FIELD",
        "epochs is too large",
        violations=[FieldViolation("spec.epochs", "at most 100")],
        metadata={"limit": "epochs_max"},
        retry_after_s=2.5,
    )
    world.tuning.failure = error
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await world.jobs.GetTuningJob(JOB, metadata=world.bearer())
    details = dict(told.value.trailing_metadata())[errors.DETAILS_KEY]
    assert details == errors.pack(error).SerializeToString()
    assert (told.value.code(), told.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "epochs is too large")


async def test_an_untyped_failure_loses_its_text(world: World):
    world.tuning.failure = RuntimeError("password=hunter2 at 10.0.0.7")
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await world.jobs.GetTuningJob(JOB, metadata=world.bearer())
    assert errors.unpack(told.value).reason == "INTERNAL"
    assert "hunter2" not in repr(told.value) + repr(told.value.trailing_metadata())


async def test_a_service_that_is_down_is_a_typed_error(world: World):
    request = billing_service_pb2.GetBalanceRequest()
    async with refused("DEPENDENCY_UNAVAILABLE", "UNAVAILABLE") as told:
        await BillingServiceStub(world.channel).GetBalance(request, metadata=world.bearer())
    assert "127.0.0.1" not in told[0].message


async def test_the_deadline_travels_and_is_shaved(world: World):
    await world.jobs.GetTuningJob(JOB, metadata=world.bearer(), timeout=60)
    assert 30 < world.tuning.remaining_s < 60 - world.settings.deadline_shave_s
    await world.jobs.GetTuningJob(JOB, metadata=world.bearer())
    assert world.tuning.remaining_s < world.settings.default_deadline_s


async def test_a_stream_passes_as_it_comes_and_its_end_too(world: World):
    world.inference.gate.clear()
    request = inference_service_pb2.StreamChatRequest(model="m")
    call: Any = world.generations.StreamChat(request, metadata=world.bearer())
    assert (await call.read()).text_delta == "Hello"
    world.inference.gate.set()
    assert (await call.read()).text_delta == " world"
    assert (await call.read()).finish_reason == generation_pb2.FINISH_REASON_STOP
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_an_error_in_the_middle_of_a_stream_is_typed(world: World):
    world.inference.failure_later = Unavailable("ENGINE_FAILED", "the engine stopped", retry_after_s=1)
    call: Any = world.generations.StreamChat(
        inference_service_pb2.StreamChatRequest(model="m"), metadata=world.bearer()
    )
    assert (await call.read()).text_delta == "Hello"
    async with refused("ENGINE_FAILED", "UNAVAILABLE"):
        await call.read()


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_a_client_that_leaves_ends_the_stream_upstream(world: World, how: str):
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{world.public_port}")
    call: Any = channel.unary_stream(
        "/finemesh.tuning.v1.TuningService/WatchTuningJob",
        request_serializer=tuning_service_pb2.WatchTuningJobRequest.SerializeToString,
    )(tuning_service_pb2.WatchTuningJobRequest(), metadata=world.bearer())
    await call.read()
    if how == "cancel":
        call.cancel()
    await channel.close()
    await asyncio.wait_for(world.tuning.watch_cancelled.wait(), 60)


async def test_a_slow_reader_holds_the_upstream_back(world: World):
    world.tuning.payload = bytes(100_000)
    request = tuning_service_pb2.WatchTuningJobRequest()
    call = world.jobs.WatchTuningJob(request, metadata=world.bearer())
    await call.read()
    written = -1
    while written != world.tuning.written:
        written = world.tuning.written
        # Bounded by flow-control windows, far below what an unread stream would bring in a second.
        assert written < 500
        await asyncio.sleep(1)
    call.cancel()


async def test_a_client_stream_passes_and_a_broken_one_never_looks_complete(world: World):
    async def messages():
        for _ in range(3):
            yield model_service_pb2.ImportBaseModelRequest()

    await world.base_models.ImportBaseModel(messages(), metadata=world.bearer())
    assert await world.models.ends.get() == "complete"
    for _ in range(3):
        await world.models.received.acquire()
    for number in range(30):
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{world.public_port}")
        call: Any = channel.stream_unary(
            "/finemesh.models.v1.ModelService/ImportBaseModel",
            request_serializer=model_service_pb2.ImportBaseModelRequest.SerializeToString,
        )(metadata=world.bearer())
        for _ in range(3):
            await call.write(model_service_pb2.ImportBaseModelRequest())
        for _ in range(3):
            await asyncio.wait_for(world.models.received.acquire(), 60)
        if number % 2:
            call.cancel()
        await channel.close()
        assert await asyncio.wait_for(world.models.ends.get(), 60) == "cancelled"


async def test_a_message_over_the_limit_is_refused_by_name(world: World):
    request = tuning_service_pb2.GetTuningJobRequest(name="x" * (world.settings.message_size_bytes_max + 1))
    async with refused("SIZE_LIMIT", "RESOURCE_EXHAUSTED") as told:
        await world.jobs.GetTuningJob(request, metadata=world.bearer())
    assert told[0].metadata["limit_bytes"] == str(world.settings.message_size_bytes_max)
    assert world.tuning.caller is None


async def test_a_key_has_a_rate(database_url, tls_dir, tmp_path):
    # None comes back while the test runs.
    async with gateway_world(database_url, tls_dir, tmp_path, rate_burst_max=3, rate_calls_per_s=0.002) as world:
        for _ in range(3):
            await world.jobs.GetTuningJob(JOB, metadata=world.bearer())
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await world.jobs.GetTuningJob(JOB, metadata=world.bearer())
        typed = errors.unpack(told.value)
        assert (typed.reason, typed.code.name) == ("RATE_LIMITED", "RESOURCE_EXHAUSTED")
        assert typed.retry_after_s is not None
        assert 400 < typed.retry_after_s <= 500
        assert error_details_pb2.RetryInfo.DESCRIPTOR.full_name in str(errors.pack(typed))
        await world.jobs.GetTuningJob(JOB, metadata=world.bearer(world.other))


@pytest.mark.parametrize(
    "method",
    [
        "/finemesh.artifacts.v1.FileArtifactService/ResolveFile",
        "/finemesh.nodes.v1.NodeService/RegisterNode",
        "/finemesh.holds.v1.HoldService/CreateHold",
        "/finemesh.tuning.v1.TuningService/Nonsense",
        "/nonsense",
    ],
)
async def test_what_is_not_public_is_not_there(world: World, method: str):
    async with refused("NOT_OFFERED", "UNIMPLEMENTED"):
        await raw_call(world.channel, method)(b"", metadata=world.bearer())


async def test_the_mesh_door_takes_only_peers_of_the_mesh(world: World):
    port = int((world.artifacts.parent / "mesh.port").read_text())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await raw_call(channel, "/finemesh.artifacts.v1.FileArtifactService/ResolveFile")(b"", timeout=2)


async def test_reflection_and_health_name_the_public_services_only(world: World):
    reflection = reflection_pb2_grpc.ServerReflectionStub(world.channel)

    async def ask(**question: str) -> reflection_pb2.ServerReflectionResponse:
        request = reflection_pb2.ServerReflectionRequest(**question)
        return await reflection.ServerReflectionInfo(iter([request])).read()

    answer = await ask(list_services="")
    names = {service.name for service in answer.list_services_response.service}
    assert names == {
        "finemesh.billing.v1.BillingService",
        "finemesh.billing.v1.BudgetService",
        "finemesh.billing.v1.InvoiceService",
        "finemesh.billing.v1.LedgerService",
        "finemesh.endpoints.v1.EndpointService",
        "finemesh.files.v1.FileService",
        "finemesh.identity.v1.IdentityService",
        "finemesh.inference.v1.InferenceService",
        "finemesh.models.v1.ModelService",
        "finemesh.tuning.v1.TuningService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    described = await ask(file_containing_symbol="finemesh.tuning.v1.TuningService")
    assert len(described.file_descriptor_response.file_descriptor_proto) > 1
    for internal in (
        "finemesh.artifacts.v1.FileArtifactService",
        "finemesh.events.v1.JobEnded",
        "finemesh.holds.v1.Hold",
    ):
        hidden = await ask(file_containing_symbol=internal)
        assert hidden.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    health = health_pb2_grpc.HealthStub(world.channel)
    for name in ("", "finemesh.tuning.v1.TuningService"):
        status = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert status.status == health_pb2.HealthCheckResponse.SERVING
