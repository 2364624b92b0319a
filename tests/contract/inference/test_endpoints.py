"""What owners of endpoints rely on: devices before serving, every started minute once, nothing held when stopped."""

from __future__ import annotations

import asyncio
import uuid

import asyncpg
import pytest

from chassis.errors import AlreadyExists, DomainError, FailedPrecondition, NotFound, Unavailable
from finemesh.endpoints.v1 import endpoint_pb2
from finemesh.endpoints.v1 import endpoint_service_pb2 as endpoints
from finemesh.endpoints.v1.endpoint_service_pb2_grpc import EndpointServiceStub
from finemesh.events.v1 import usage_events_pb2
from finemesh.inference.v1 import generation_pb2 as generation
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.contract.inference.conftest import BASE, World
from tests.contract.inference.test_chat import metered
from tests.harness.polling import eventually


async def reaches(world: World, name: str, state: str) -> endpoint_pb2.Endpoint:
    """The endpoint once it is in that state."""
    stub = EndpointServiceStub(world.channel)

    async def look() -> endpoint_pb2.Endpoint:
        return (await stub.GetEndpoint(endpoints.GetEndpointRequest(name=name))).endpoint

    wanted = endpoint_pb2.EndpointState.Value(f"ENDPOINT_STATE_{state}")
    return await eventually(look, lambda found: found.state == wanted, pause_s=0.02)


async def minutes(world: World, name: str) -> list[usage_events_pb2.EndpointMinuteRecorded]:
    connection = await asyncpg.connect(world.settings.database_url)
    rows = await connection.fetch("SELECT payload FROM outbox WHERE subject = 'usage.endpoint.minute_recorded'")
    await connection.close()
    events = [usage_events_pb2.EndpointMinuteRecorded.FromString(row["payload"]) for row in rows]
    return [event for event in events if event.endpoint == name]


async def create(world: World, **fields: object) -> endpoint_pb2.Endpoint:
    request = endpoints.CreateEndpointRequest(
        **{"endpoint_name": f"e-{uuid.uuid4().hex[:8]}", "model": BASE, **fields}  # type: ignore[arg-type]
    )
    return (await EndpointServiceStub(world.channel).CreateEndpoint(request)).endpoint


async def test_a_whole_life_with_chat_minutes_stop_and_delete(world: World) -> None:
    stub = EndpointServiceStub(world.channel)
    with world.caller():
        made = await create(world)
        assert made.state == endpoint_pb2.ENDPOINT_STATE_PENDING
        ready = await reaches(world, made.name, "READY")
        assert ready.hardware_type == "cpu"
        answer = await InferenceServiceStub(world.channel).Chat(
            inference.ChatRequest(
                model=made.endpoint_id,
                messages=[generation.ChatMessage(role="user", content="hi")],
                sampling=generation.SamplingParameters(output_tokens_max=4),
            )
        )
        assert answer.usage.output_tokens <= 4
        # Its minutes pay for the tokens: a second record would bill them twice.
        assert answer.generation_id not in await metered(world)
        # Minutes go by on the clock of the service.
        await asyncio.sleep(0.5)
        with pytest.raises(FailedPrecondition) as refused:
            await stub.DeleteEndpoint(endpoints.DeleteEndpointRequest(name=made.name))
        assert refused.value.reason == "STATE_CONFLICT"
        await stub.StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
        stopped = await reaches(world, made.name, "STOPPED")
        recorded = await minutes(world, made.name)
        # More than half a second of 0.2 s minutes was started: three at least, each once.
        assert len(recorded) == stopped.billed_minutes >= 3
        assert sorted(event.minute for event in recorded) == list(range(len(recorded)))
        assert len({event.work_key for event in recorded}) == len(recorded)
        assert world.scheduler.owner == ""
        with pytest.raises(Unavailable):
            await InferenceServiceStub(world.channel).Chat(
                inference.ChatRequest(
                    model=made.endpoint_id, messages=[generation.ChatMessage(role="user", content="hi")]
                )
            )
        await stub.DeleteEndpoint(endpoints.DeleteEndpointRequest(name=made.name))
        with pytest.raises(NotFound):
            await stub.GetEndpoint(endpoints.GetEndpointRequest(name=made.name))


async def test_it_waits_for_devices_and_says_for_what(world: World) -> None:
    world.scheduler.busy = True
    try:
        with world.caller():
            made = await create(world)
            get = EndpointServiceStub(world.channel).GetEndpoint
            request = endpoints.GetEndpointRequest(name=made.name)

            async def look() -> endpoint_pb2.Endpoint:
                return (await get(request)).endpoint

            found = await eventually(look, lambda each: "0 of 1 free" in each.status_message)
            assert found.state == endpoint_pb2.ENDPOINT_STATE_PENDING
            await EndpointServiceStub(world.channel).StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
            await reaches(world, made.name, "STOPPED")
            assert not await minutes(world, made.name)
    finally:
        world.scheduler.busy = False


async def test_lost_devices_begin_again_under_a_new_lease(world: World) -> None:
    with world.caller():
        made = await create(world)
        await reaches(world, made.name, "READY")
        world.scheduler.owner = ""  # The scheduler gave the devices away.
        await world.scheduler.gives()
        await reaches(world, made.name, "READY")
        recorded = await minutes(world, made.name)
        assert len({event.work_key for event in recorded}) == len(recorded)
        await EndpointServiceStub(world.channel).StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
        await reaches(world, made.name, "STOPPED")


async def test_creating_is_idempotent_by_request_id(world: World) -> None:
    with world.caller():
        world.scheduler.busy = True
        first = await create(world, endpoint_name="once", request_id="r1")
        again = await create(world, endpoint_name="once", request_id="r1")
        assert first.name == again.name
        with pytest.raises(AlreadyExists) as refused:
            await create(world, endpoint_name="twice", request_id="r1")
        assert refused.value.reason == "REQUEST_ID_REUSED"
        with pytest.raises(AlreadyExists) as refused:
            await create(world, endpoint_name="once")
        assert refused.value.reason == "ALREADY_EXISTS"
        await EndpointServiceStub(world.channel).StopEndpoint(endpoints.StopEndpointRequest(name=first.name))
        await reaches(world, first.name, "STOPPED")
        world.scheduler.busy = False


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"endpoint_name": "Bad Name"}, "INVALID_FIELD"),
        ({"gpu_count": 10_000}, "INVALID_FIELD"),
        ({"model": ""}, "INVALID_FIELD"),
        ({"model": "nobody/nothing"}, "MODEL_UNKNOWN"),
    ],
)
async def test_bad_endpoints_leave_no_row(world: World, fields: dict[str, object], reason: str) -> None:
    stub = EndpointServiceStub(world.channel)
    with world.caller(project="proj_strict", namespace="strict"):
        with pytest.raises(DomainError) as refused:
            await create(world, **fields)
        assert refused.value.reason == reason
        assert not (await stub.ListEndpoints(endpoints.ListEndpointsRequest())).endpoints


async def test_foreign_endpoints_do_not_exist(world: World) -> None:
    with world.caller():
        made = await create(world)
        await reaches(world, made.name, "READY")
    with world.caller(project="proj_b"), pytest.raises(NotFound):
        await EndpointServiceStub(world.channel).StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
    with world.caller():
        await EndpointServiceStub(world.channel).StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
        await reaches(world, made.name, "STOPPED")
