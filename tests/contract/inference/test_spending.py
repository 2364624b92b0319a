"""What billing says of credit and caps decides over calls and endpoints: refusals before any work,
parking, resuming."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.errors import FailedPrecondition, Unavailable
from finemesh.endpoints.v1 import endpoint_pb2
from finemesh.endpoints.v1 import endpoint_service_pb2 as endpoints
from finemesh.endpoints.v1.endpoint_service_pb2_grpc import EndpointServiceStub
from finemesh.events.v1 import billing_events_pb2
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.contract.inference.conftest import BASE, World, handled, publish
from tests.contract.inference.test_chat import GREEDY, HELLO
from tests.contract.inference.test_endpoints import create, minutes, reaches
from tests.harness.polling import eventually

_numbers = itertools.count(1)


@pytest.fixture
def project() -> str:
    """A project, and so an organization, that no other test has."""
    return f"proj_spending_{next(_numbers)}"


async def say_credit(world: World, project: str, state: str, revision: int) -> uuid.UUID:
    return await publish(
        world,
        billing_events_pb2.CreditStateChanged(organization_id=f"org_of_{project}", to_state=state, revision=revision),
    )


async def say_cap(
    world: World, project: str, capped: bool, revision: int, *, key: str = "", hours: float = 24.0
) -> uuid.UUID:
    until = Timestamp()
    until.FromDatetime(datetime.now(UTC) + timedelta(hours=hours))
    return await publish(
        world,
        billing_events_pb2.SpendCapStateChanged(
            organization_id=f"org_of_{project}",
            project_id=project,
            api_key_id=key,
            capped=capped,
            until_time=until,
            cap_nanos_usd=5 * 10**9,
            revision=revision,
        ),
    )


async def chat(world: World, project: str, model: str = BASE) -> str:
    """`ok`, or the reason of the refusal."""
    stub = InferenceServiceStub(world.channel)
    with world.caller(project):
        try:
            await stub.Chat(inference.ChatRequest(model=model, messages=HELLO, sampling=GREEDY))
        except FailedPrecondition as refused:
            return refused.reason
    return "ok"


async def chat_becomes(world: World, project: str, outcome: str, model: str = BASE) -> None:
    await eventually(lambda: chat(world, project, model), lambda found: found == outcome, pause_s=0.02)


async def test_without_credit_calls_are_refused_until_there_is_some(world: World, project: str) -> None:
    assert await chat(world, project) == "ok"
    await say_credit(world, project, "EXHAUSTED", 5)
    await chat_becomes(world, project, "BALANCE_INSUFFICIENT")
    # Before any work: nobody looks whether there is such a model.
    model = "nobody/nothing"
    stub = InferenceServiceStub(world.channel)
    with world.caller(project):
        for call in (
            stub.Chat(inference.ChatRequest(model=model, messages=HELLO)),
            stub.Complete(inference.CompleteRequest(model=model, prompt="a")),
            anext(aiter(stub.StreamChat(inference.StreamChatRequest(model=model, messages=HELLO)))),
            anext(aiter(stub.StreamComplete(inference.StreamCompleteRequest(model=model, prompt="a")))),
        ):
            with pytest.raises(FailedPrecondition, match="BALANCE_INSUFFICIENT") as refused:
                await call
            assert "add credit" in refused.value.message
    assert await chat(world, "proj_a") == "ok"
    # An older word that comes late changes nothing.
    await say_credit(world, project, "SUFFICIENT", 4)
    await say_credit(world, project, "LOW", 6)
    await chat_becomes(world, project, "ok")
    await handled(world, await say_credit(world, project, "EXHAUSTED", 5))
    assert await chat(world, project) == "ok"


async def test_caps_stop_a_key_or_a_project_until_the_month_ends(world: World, project: str) -> None:
    await handled(world, await say_cap(world, project, True, 1, key="key_other"))
    await handled(world, await say_cap(world, project, True, 1, hours=-1.0))
    assert await chat(world, project) == "ok"
    await say_cap(world, project, True, 2, key="key_1")
    await chat_becomes(world, project, "SPEND_CAP_EXCEEDED")
    await say_cap(world, project, False, 3, key="key_1")
    await chat_becomes(world, project, "ok")
    await say_cap(world, project, True, 2)
    await chat_becomes(world, project, "SPEND_CAP_EXCEEDED")


async def test_an_endpoint_without_credit_is_parked_and_resumes(world: World, project: str) -> None:
    stub = EndpointServiceStub(world.channel)
    with world.caller(project):
        made = await create(world)
        await reaches(world, made.name, "READY")
        await say_credit(world, project, "EXHAUSTED", 1)
        parked = await reaches(world, made.name, "PARKED")
        assert "add credit" in parked.status_message
        assert (parked.model, parked.gpu_count) == (made.model, made.gpu_count)
        assert world.scheduler.owner == ""
        assert await chat(world, project, made.endpoint_id) == "BALANCE_INSUFFICIENT"
        counted = await minutes(world, made.name)
        assert len(counted) == parked.billed_minutes >= 1
        for refused in (stub.StartEndpoint(endpoints.StartEndpointRequest(name=made.name)), create(world)):
            with pytest.raises(FailedPrecondition, match="BALANCE_INSUFFICIENT"):
                await refused
        # Long enough for two of its minutes, none of which may come.
        await asyncio.sleep(0.5)
        assert len(await minutes(world, made.name)) == len(counted)
        resumed_s = time.monotonic()
        await say_credit(world, project, "SUFFICIENT", 2)
        resumed = await reaches(world, made.name, "READY")
        # A begun minute counts; those that it was parked for are two more.
        ran_s = time.monotonic() - resumed_s
        assert resumed.billed_minutes - parked.billed_minutes <= ran_s / world.settings.endpoint_minute_s + 1
        await chat_becomes(world, project, "ok", made.endpoint_id)
        await stub.StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
        await reaches(world, made.name, "STOPPED")


async def test_what_its_owner_stopped_stays_stopped(world: World, project: str) -> None:
    stub = EndpointServiceStub(world.channel)
    with world.caller(project):
        stopped, parked, deleted = [await create(world) for _ in range(3)]
        await stub.StopEndpoint(endpoints.StopEndpointRequest(name=stopped.name))
        await reaches(world, stopped.name, "STOPPED")
        await say_credit(world, project, "EXHAUSTED", 1)
        for each in (parked, deleted):
            await reaches(world, each.name, "PARKED")
        await stub.StopEndpoint(endpoints.StopEndpointRequest(name=parked.name))
        await reaches(world, parked.name, "STOPPED")
        await stub.DeleteEndpoint(endpoints.DeleteEndpointRequest(name=deleted.name))
        await say_credit(world, project, "SUFFICIENT", 2)
        await chat_becomes(world, project, "ok")
        # Long enough for many looks of the reconciler, which tells nobody that it let an endpoint be.
        await asyncio.sleep(0.3)
        listed = (await stub.ListEndpoints(endpoints.ListEndpointsRequest())).endpoints
        assert {each.name: each.state for each in listed} == {
            each.name: endpoint_pb2.ENDPOINT_STATE_STOPPED for each in (stopped, parked)
        }


async def test_the_cap_of_a_project_parks_its_endpoints(world: World, project: str) -> None:
    with world.caller(project):
        made = await create(world)
        await reaches(world, made.name, "READY")
        await say_cap(world, project, True, 1)
        assert "5.00 USD" in (await reaches(world, made.name, "PARKED")).status_message
        await say_cap(world, project, False, 2)
        await reaches(world, made.name, "READY")
        await EndpointServiceStub(world.channel).StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
        await reaches(world, made.name, "STOPPED")


async def test_time_that_an_endpoint_was_stopped_is_never_billed(world: World, project: str) -> None:
    stub = EndpointServiceStub(world.channel)
    with world.caller(project):
        made = await create(world)
        await reaches(world, made.name, "READY")
        await stub.StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
        before = await reaches(world, made.name, "STOPPED")
        # Five of its minutes, which pass on the clock of the service.
        await asyncio.sleep(1.0)
        # Started again, and stopped as soon as it has devices.
        started_s = time.monotonic()
        await stub.StartEndpoint(endpoints.StartEndpointRequest(name=made.name))
        await world.scheduler.gives()
        await stub.StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
        after = await reaches(world, made.name, "STOPPED")
        # A begun minute counts; those that it was stopped for are five more.
        ran_s = time.monotonic() - started_s
        assert after.billed_minutes - before.billed_minutes <= ran_s / world.settings.endpoint_minute_s + 1
        with pytest.raises(Unavailable):
            await InferenceServiceStub(world.channel).Chat(
                inference.ChatRequest(model=made.endpoint_id, messages=HELLO)
            )
