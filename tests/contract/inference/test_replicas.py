"""Two processes of inference on one database: any answers for an endpoint, and none is lost with its process."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from chassis.errors import DeadlineExceeded, DomainError, NotFound
from chassis.rpc.channel import open_channel
from finemesh.endpoints.v1 import endpoint_service_pb2 as endpoints
from finemesh.endpoints.v1.endpoint_service_pb2_grpc import EndpointServiceStub
from finemesh.inference.v1 import generation_pb2 as generation
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.contract.inference.conftest import World, running_beside, running_world
from tests.contract.inference.test_chat import GREEDY, HELLO, metered
from tests.contract.inference.test_endpoints import create, minutes, reaches
from tests.harness.fixtures import SettingsFactory
from tests.harness.polling import eventually

ROOT = Path(__file__).parents[3]
CLAIM_S = 1.0
LEASE_S = 2.0
# What the processes of one database have in common.
SAME = {
    "database_url",
    "nats_url",
    "tls_dir",
    "artifacts_url",
    "data_dir",
    "engine",
    "scheduler_agents_address",
    "billing_address",
    "endpoint_poll_s",
    "claim_duration_s",
}


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def no_endpoint_is_left(make_settings: SettingsFactory) -> AsyncIterator[None]:
    """The scheduler of each test has one device."""
    yield
    connection = await asyncpg.connect(make_settings().database_url)
    await connection.execute("DELETE FROM endpoints")
    await connection.close()


@pytest_asyncio.fixture(loop_scope="session")
async def owner(make_settings: SettingsFactory, base_folder: Path, tmp_path: Path) -> AsyncIterator[World]:
    """The process that has the endpoint of each test: it was there first."""
    world = running_world(
        make_settings, base_folder, tmp_path, claim_duration_s=CLAIM_S, queue_requests_max=1, stub_token_s=0.02
    )
    async with world as made:
        yield made


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
            assert list(answers[0].choices) == list(answers[1].choices)
            assert answers[1].revision == answers[0].revision != ""
            streamed = inference.StreamChatRequest(model=made.endpoint_id, messages=HELLO, sampling=GREEDY)
            parts = [part async for part in stubs[1].StreamChat(streamed)]
            assert "".join(part.text_delta for part in parts) == answers[0].choices[0].message.content
            assert len(parts) > 1
            text = inference.CompleteRequest(model=made.endpoint_id, prompt="hm", sampling=GREEDY)
            continued = inference.StreamCompleteRequest(model=made.endpoint_id, prompt="hm", sampling=GREEDY)
            whole = await stubs[1].Complete(text)
            assert whole.choices[0].text == "".join(
                [part.text_delta async for part in stubs[1].StreamComplete(continued)]
            )
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


class Replica:
    """A process of inference of its own, which a test may freeze and kill."""

    def __init__(self, world: World, folder: Path, **overrides: object) -> None:
        self._world = world
        self._port_file = folder / "replica.port"
        settings = world.settings.model_dump(include=SAME)
        values = settings | {"port_file": self._port_file, "log_format": "console"} | overrides
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
        environment |= {f"FINEMESH_INFERENCE_{name.upper()}": str(value) for name, value in values.items()}
        log = (folder / "replica.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.inference.main"], env=environment, cwd=ROOT, stdout=log, stderr=log
        )

    async def stub(self) -> Any:
        port = await eventually(self._port)
        gateway = self._world.settings.model_copy(update={"service_name": "gateway"})
        return InferenceServiceStub(open_channel(gateway, f"127.0.0.1:{port}", "inference"))

    async def _port(self) -> str:
        return self._port_file.read_text().strip() if self._port_file.exists() else ""

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


async def test_a_frozen_owner_serves_nobody_when_it_wakes_up(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    """Earns its ten seconds: only a process that really stands still shows what it does first when it goes on."""
    limits: dict[str, Any] = {"claim_duration_s": CLAIM_S, "device_margin_s": 0.5, "stub_token_s": 0.3}
    world_of = running_world(make_settings, base_folder, tmp_path, node_name="here", lease_s=LEASE_S, **limits)
    async with world_of as world:
        world.scheduler.node = "there"
        replica = Replica(world, tmp_path, node_name="there", **limits)
        try:
            with world.caller():
                made = await create(world)
                direct, through = await replica.stub(), InferenceServiceStub(world.channel)
                await reaches(world, made.name, "READY")
                before = await row(world, made.name)
                request = inference.StreamChatRequest(model=made.endpoint_id, messages=HELLO, sampling=GREEDY)
                got: dict[str, list[str]] = {"own": [], "passed on": []}
                own = asyncio.create_task(collect(direct.StreamChat(request), got["own"]))
                passed_on = asyncio.create_task(collect(through.StreamChat(request), got["passed on"]))
                await eventually(both_begun(got))
                replica.process.send_signal(signal.SIGSTOP)
                assert await asyncio.wait_for(passed_on, 60) == "DEPENDENCY_UNAVAILABLE"
                world.scheduler.node = "here"
                await eventually(
                    lambda: row(world, made.name), lambda found: found["owner"] not in ("", before["owner"])
                )
                await reaches(world, made.name, "READY")
                seen = len(got["own"])
                replica.process.send_signal(signal.SIGCONT)
                # What it had begun ends without another token: its device is another's by now.
                assert await asyncio.wait_for(own, 60) == "ENGINE_FAILED"
                assert len(got["own"]) == seen
                # It passes calls on as any other does, and when it dies nobody misses anything.
                assert await answers(direct, made.endpoint_id)
                replica.process.kill()
                after = await row(world, made.name)
                assert (world.scheduler.owner, world.scheduler.token) == (made.name, after["lease_token"])
                assert await answers(through, made.endpoint_id)
        finally:
            replica.end()


async def test_a_killed_owner_leaves_no_lease_and_no_endpoint_behind(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    limits: dict[str, Any] = {"claim_duration_s": CLAIM_S, "device_margin_s": 0.5}
    world_of = running_world(make_settings, base_folder, tmp_path, node_name="here", lease_s=LEASE_S, **limits)
    async with world_of as world:
        world.scheduler.node = "there"
        replica = Replica(world, tmp_path, node_name="there", **limits)
        try:
            with world.caller():
                made = await create(world)
                await reaches(world, made.name, "READY")
                before, through = await row(world, made.name), InferenceServiceStub(world.channel)
                replica.process.kill()
                world.scheduler.node = "here"
                after = await eventually(
                    lambda: row(world, made.name), lambda found: found["owner"] not in ("", before["owner"])
                )
                await reaches(world, made.name, "READY")
                assert await answers(through, made.endpoint_id)
                assert after["lease_token"] > before["lease_token"]
                assert (world.scheduler.owner, world.scheduler.token) == (made.name, after["lease_token"])
                recorded = await minutes(world, made.name)
                assert len({event.usage_time.ToNanoseconds() for event in recorded}) == len(recorded)
                stop = EndpointServiceStub(world.channel).StopEndpoint
                await stop(endpoints.StopEndpointRequest(name=made.name))
                await reaches(world, made.name, "STOPPED")
                assert not world.scheduler.owner
        finally:
            replica.end()


def both_begun(got: dict[str, list[str]]) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return all(got.values())

    return look


async def collect(stream: Any, texts: list[str]) -> str:
    """Reads an answer part by part; the reason for which it ended before its time."""
    try:
        async for part in stream:
            texts.append(part.text_delta)  # noqa: PERF401  # what came before an error counts
    except DomainError as error:
        return error.reason
    return ""


async def answers(stub: Any, model: str) -> bool:
    try:
        async with asyncio.timeout(30):
            await stub.Chat(asked(model))
    except DomainError:
        return False
    return True
