"""Streams fill their own cap, each caller's first: plain calls and health are served all the same."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import identity
from chassis.errors import DeadlineExceeded, DomainError, ResourceExhausted
from chassis.identity import Caller
from chassis.rpc.channel import open_channel
from chassis.rpc.server import ServerBuilder
from tests.harness.living import living
from tests.harness.polling import eventually

from .echo import SERVICE, Echo, EchoStub, add_echo_to_server, settings_of, stub_of

LIMITS: dict[str, Any] = {"concurrent_calls_max": 2, "streams_max": 3, "streams_per_caller_max": 2}
ONE = Caller(service="", tenant="p1", account="o1", subject="key_1")
TWO = Caller(service="", tenant="p2", account="o2", subject="key_2")


class Patient(Echo):
    """A stream of it lasts, and a call too while the gate is closed."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0

    async def Say(self, request: StringValue, context: object) -> StringValue:
        self.waiting += 1
        await self.gate.wait()
        return request

    async def Count(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        yield request
        await asyncio.Event().wait()


@asynccontextmanager
async def limited(tls_dir: Path, **values: Any) -> AsyncIterator[tuple[Patient, EchoStub, Any]]:
    """The implementation, a stub, and what asks for health."""
    echo, settings = Patient(), settings_of("back", tls_dir, **(LIMITS | values))
    async with living(settings) as process:
        builder = ServerBuilder(process, settings, trusted_forwarders={"front"})
        builder.add(add_echo_to_server, echo, SERVICE, {"front"}, endless={"Count"})
        await builder.start()
        async with (
            stub_of(settings_of("front", tls_dir), builder.port, "back") as stub,
            open_channel(settings_of("stranger", tls_dir), f"127.0.0.1:{builder.port}", "back") as channel,
        ):
            yield echo, stub, health_pb2_grpc.HealthStub(channel)


async def opened(stub: EchoStub, caller: Caller, ends: AsyncExitStack) -> Any:
    """A stream whose first message is here; it is cancelled at the end."""
    with identity.acting_as(caller):
        stream = stub.Count(StringValue())
    ends.callback(stream.cancel)
    await stream.read()
    return stream


async def healthy(health: Any) -> bool:
    answer = await health.Check(health_pb2.HealthCheckRequest())
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def refusal(stub: EchoStub, caller: Caller, ends: AsyncExitStack) -> DomainError:
    with pytest.raises(ResourceExhausted) as caught:
        await opened(stub, caller, ends)
    return caught.value


async def test_streams_keep_out_neither_calls_nor_health(tls_dir: Path) -> None:
    async with limited(tls_dir) as (_, stub, health), AsyncExitStack() as ends:
        for caller in (ONE, ONE, TWO):
            await opened(stub, caller, ends)
        assert await healthy(health)
        assert await stub.Say(StringValue(value="a")) == StringValue(value="a")
        watching = health.Watch(health_pb2.HealthCheckRequest())
        ends.callback(watching.cancel)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        full = await refusal(stub, TWO, ends)
    assert (full.reason, full.metadata) == ("CONCURRENCY_LIMIT", {"limit": "streams_max", "limit_count": "3"})
    assert "streams_max" in full.message
    assert full.retry_after_s is not None


async def test_who_watches_health_keeps_out_nobody(tls_dir: Path) -> None:
    """Not even who comes later: the oldest watch of the connection gives way."""
    async with (
        limited(tls_dir, open_calls_per_connection_max=3, open_calls_max=3) as (_, stub, health),
        AsyncExitStack() as ends,
    ):

        async def watch() -> Any:
            watching = health.Watch(health_pb2.HealthCheckRequest())
            ends.callback(watching.cancel)
            await watching.read()
            return watching

        oldest = await watch()
        for _ in range(3):
            await watch()
        with pytest.raises(ResourceExhausted) as gave_way:
            await oldest.read()
        assert gave_way.value.metadata == {"limit": "open_calls_per_connection_max", "limit_count": "3"}
        assert await healthy(health)
        for caller in (ONE, ONE, TWO):
            await opened(stub, caller, ends)


async def test_a_watch_of_health_ends_after_its_time(tls_dir: Path) -> None:
    async with limited(tls_dir, open_call_s_max=0.05) as (_, _, health):
        watching = health.Watch(health_pb2.HealthCheckRequest(), timeout=600)
        await watching.read()
        with pytest.raises(DeadlineExceeded):
            await watching.read()


async def test_one_caller_has_a_part_of_the_streams(tls_dir: Path) -> None:
    async with limited(tls_dir) as (_, stub, _), AsyncExitStack() as ends:
        first = await opened(stub, ONE, ends)
        await opened(stub, ONE, ends)
        full = await refusal(stub, ONE, ends)
        assert full.metadata == {"limit": "streams_per_caller_max", "limit_count": "2"}
        assert "close" in full.message
        await opened(stub, TWO, ends)

        # A stream that ended makes room again, for its caller and in all.
        first.cancel()

        async def has_room() -> bool:
            try:
                await opened(stub, ONE, ends)
            except ResourceExhausted:
                return False
            return True

        await eventually(has_room, bool)


async def test_peers_that_speak_for_themselves_share_the_whole(tls_dir: Path) -> None:
    async with limited(tls_dir) as (_, stub, _), AsyncExitStack() as ends:
        for _ in range(3):
            await opened(stub, Caller(service="front"), ends)


async def test_calls_are_capped_and_health_is_not(tls_dir: Path) -> None:
    async with limited(tls_dir) as (echo, stub, health), AsyncExitStack() as ends:
        echo.gate.clear()
        calls = [asyncio.ensure_future(stub.Say(StringValue(value=str(number)))) for number in range(2)]
        await eventually(lambda: asyncio.sleep(0, echo.waiting), lambda waiting: waiting == 2)
        with pytest.raises(ResourceExhausted) as caught:
            await stub.Say(StringValue())
        assert caught.value.metadata == {"limit": "concurrent_calls_max", "limit_count": "2"}
        assert await healthy(health)
        await opened(stub, ONE, ends)
        echo.gate.set()
        assert [answer.value for answer in await asyncio.gather(*calls)] == ["0", "1"]
        await stub.Say(StringValue())


async def test_one_caller_has_a_part_of_the_calls(tls_dir: Path) -> None:
    async with limited(tls_dir, calls_per_caller_max=1) as (echo, stub, _):
        echo.gate.clear()
        with identity.acting_as(ONE):
            call = asyncio.ensure_future(stub.Say(StringValue(value="one")))
        await eventually(lambda: asyncio.sleep(0, echo.waiting), lambda waiting: waiting == 1)
        with identity.acting_as(ONE), pytest.raises(ResourceExhausted) as caught:
            await stub.Say(StringValue())
        assert caught.value.metadata == {"limit": "calls_per_caller_max", "limit_count": "1"}
        echo.gate.set()
        with identity.acting_as(TWO):
            await stub.Say(StringValue())
        assert (await call).value == "one"


async def test_an_untyped_client_reads_the_limit_too(tls_dir: Path) -> None:
    async with limited(tls_dir, streams_max=1) as (_, stub, _), AsyncExitStack() as ends:
        await opened(stub, ONE, ends)
        with pytest.raises(ResourceExhausted) as caught:
            await opened(stub, ONE, ends)
        assert isinstance(caught.value.__cause__, grpc.aio.AioRpcError)
        assert "streams_max" in (caught.value.__cause__.details() or "")
