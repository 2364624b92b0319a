"""Two processes of inference on one database: any answers for an endpoint, and none is lost with its process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from chassis.errors import DeadlineExceeded, DomainError, NotFound
from finemesh.inference.v1 import generation_pb2 as generation
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.contract.inference.conftest import World, running_beside, running_world
from tests.contract.inference.test_chat import GREEDY, HELLO, metered
from tests.contract.inference.test_endpoints import create, minutes, reaches
from tests.harness.fixtures import SettingsFactory
from tests.harness.polling import eventually

CLAIM_S = 1.0


@pytest_asyncio.fixture(loop_scope="session")
async def owner(make_settings: SettingsFactory, base_folder: Path, tmp_path: Path) -> AsyncIterator[World]:
    """The process that has the endpoint of each test: it was there first."""
    world = running_world(
        make_settings, base_folder, tmp_path, claim_duration_s=CLAIM_S, queue_requests_max=1, stub_token_s=0.02
    )
    async with world as made:
        yield made
    # The scheduler of the next test has one device, too.
    connection = await asyncpg.connect(made.settings.database_url)
    await connection.execute("DELETE FROM endpoints")
    await connection.close()


async def row(world: World, name: str) -> asyncpg.Record:
    connection = await asyncpg.connect(world.settings.database_url)
    found = await connection.fetchrow("SELECT * FROM endpoints WHERE id = $1", name.rpartition("/")[2])
    await connection.close()
    assert found is not None
    return found


def asked(model: str) -> inference.ChatRequest:
    return inference.ChatRequest(model=model, messages=HELLO, sampling=GREEDY)


async def test_any_replica_passes_a_call_on(owner: World, tmp_path: Path) -> None:
    with owner.caller():
        made = await create(owner)
        await reaches(owner, made.name, "READY")
        async with running_beside(owner, tmp_path) as other:
            stubs = [InferenceServiceStub(world.channel) for world in (owner, other)]
            answers = [await stub.Chat(asked(made.endpoint_id)) for stub in stubs]
            assert answers[0].message == answers[1].message
            assert answers[1].revision == answers[0].revision != ""
            streamed = inference.StreamChatRequest(model=made.endpoint_id, messages=HELLO, sampling=GREEDY)
            parts = [part async for part in stubs[1].StreamChat(streamed)]
            assert "".join(part.text_delta for part in parts) == answers[0].message.content
            assert len(parts) > 1
            text = inference.CompleteRequest(model=made.endpoint_id, prompt="hm", sampling=GREEDY)
            continued = inference.StreamCompleteRequest(model=made.endpoint_id, prompt="hm", sampling=GREEDY)
            whole = await stubs[1].Complete(text)
            assert whole.text == "".join([part.text_delta async for part in stubs[1].StreamComplete(continued)])
            # What the endpoint's minutes pay for is nobody's tokens, wherever the call came in.
            assert not {answers[1].generation_id, parts[0].generation_id} & set(await metered(owner))
            # The owner of the endpoint judges the call, and its words come back as they are.
            with pytest.raises(DomainError) as refused:
                await stubs[1].Chat(
                    inference.ChatRequest(
                        model=made.endpoint_id,
                        messages=HELLO,
                        sampling=generation.SamplingParameters(output_tokens_max=10_000),
                    )
                )
            assert refused.value.reason == "CONTEXT_TOO_LONG"
            # The engine takes one request at a time: the next one gets in once those of callers that left are gone.
            async for _ in stubs[1].StreamChat(streamed):
                break
            await eventually(lambda: succeeds(stubs[1], made.endpoint_id))
            with pytest.raises(DeadlineExceeded):
                await stubs[1].Chat(asked(made.endpoint_id), timeout=0.06)
            await eventually(lambda: succeeds(stubs[1], made.endpoint_id))
    with owner.caller(project="proj_b"), pytest.raises(NotFound):
        await stubs[0].Chat(asked(made.endpoint_id))


async def succeeds(stub: Any, model: str) -> bool:
    try:
        await stub.Chat(asked(model))
    except DomainError as error:
        assert error.reason == "CAPACITY_EXHAUSTED", error
        return False
    return True


async def test_a_rolling_restart_loses_no_endpoint(owner: World, tmp_path: Path) -> None:
    with owner.caller():
        made = await create(owner)
        await reaches(owner, made.name, "READY")
        async with running_beside(owner, tmp_path) as other:
            stub = InferenceServiceStub(other.channel)
            assert await succeeds(stub, made.endpoint_id)
            before = await row(owner, made.name)
            owner.process.stop()
            after = await eventually(
                lambda: row(other, made.name), lambda found: found["owner"] not in ("", before["owner"])
            )
            await reaches(other, made.name, "READY")
            assert await succeeds(stub, made.endpoint_id)
            assert after["lease_token"] > before["lease_token"]
            assert other.scheduler.owner == made.name
            assert other.scheduler.token == after["lease_token"]
            recorded = await minutes(other, made.name)
            begins = sorted(event.usage_time.ToNanoseconds() for event in recorded)
            assert all(later - earlier >= 0.2e9 for earlier, later in itertools.pairwise(begins))


async def test_a_route_that_was_old_is_followed_to_the_new_owner(owner: World, tmp_path: Path) -> None:
    with owner.caller():
        made = await create(owner)
        await reaches(owner, made.name, "READY")
        async with running_beside(owner, tmp_path) as other:
            # The row names a process that is gone, whose claim lasts: nobody else can tell.
            connection = await asyncpg.connect(owner.settings.database_url)
            take = "UPDATE endpoints SET owner = 'inf_gone', owner_address = '127.0.0.1:1', claim_until = $1"
            await connection.execute(take, (await connection.fetchval("SELECT now() + interval '5 s'")))
            stub = InferenceServiceStub(other.channel)
            with pytest.raises(DomainError) as refused:
                await stub.Chat(asked(made.endpoint_id))
            assert refused.value.reason == "DEPENDENCY_UNAVAILABLE"
            # Once the claim is over, somebody else has it, and a caller finds the new owner through anybody.
            await connection.close()
            await eventually(lambda: answers(stub, made.endpoint_id))
            assert (await row(other, made.name))["owner"] != "inf_gone"
            assert await answers(InferenceServiceStub(owner.channel), made.endpoint_id)


async def answers(stub: Any, model: str) -> bool:
    try:
        async with asyncio.timeout(30):
            await stub.Chat(asked(model))
    except DomainError:
        return False
    return True
