"""What a server refuses, and what it ends: strangers, forged identities, short deadlines, large messages, streams."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from chassis import identity
from chassis.errors import (
    Cancelled,
    DeadlineExceeded,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from chassis.identity import Caller
from chassis.process import Process
from chassis.rpc import deadline
from chassis.rpc.channel import open_channel
from chassis.rpc.server import ServerBuilder
from chassis.settings import ChassisSettings
from tests.harness.living import living
from tests.harness.raw_calls import raw_call

from .echo import SERVICE, Echo, add_echo_to_server, settings_of, stub_of

WAIT_S_MAX = 30


class Witness(Echo):
    """Remembers who called and what was left of the deadline, and can take its time."""

    def __init__(self) -> None:
        self.caller: Caller | None = None
        self.remaining_s: float | None = None
        self.calls = 0
        self.slow = False
        self.began, self.ended = asyncio.Event(), asyncio.Event()

    async def Say(self, request: StringValue, context: object) -> StringValue:
        self.calls += 1
        self.began.set()
        self.caller, self.remaining_s = identity.current_caller(), deadline.remaining_s()
        try:
            if self.slow:
                await asyncio.Event().wait()
        finally:
            self.ended.set()
        return request

    async def Count(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        try:
            yield StringValue(value="0")
            await asyncio.Event().wait()
        finally:
            self.ended.set()


@contextlib.asynccontextmanager
async def serving(
    settings: ChassisSettings, echo: Echo, **options: Any
) -> AsyncIterator[tuple[Process, ServerBuilder]]:
    async with living(settings) as process:
        endless = options.pop("endless", ())
        builder = ServerBuilder(process, settings, **options)
        builder.add(add_echo_to_server, echo, SERVICE, {"front"}, endless=endless)
        await builder.start()
        yield process, builder


async def test_only_listed_callers_are_served(tls_dir: Path) -> None:
    echo = Witness()
    async with (
        serving(settings_of("back", tls_dir), echo) as (_, server),
        stub_of(settings_of("stranger", tls_dir), server.port, "back") as stub,
    ):
        with pytest.raises(PermissionDenied) as caught:
            await stub.Say(StringValue())
    assert caught.value.reason == "CALLER_NOT_ALLOWED"
    assert caught.value.metadata == {"caller": "stranger"}
    assert echo.calls == 0


async def test_identity_is_believed_from_trusted_forwarders_only(tls_dir: Path) -> None:
    echo = Witness()
    user = Caller(service="", tenant="p1", account="o1", subject="k1", roles=frozenset({"admin"}))
    for trusted, believed in (((), ""), (("front",), "p1")):
        async with (
            serving(settings_of("back", tls_dir), echo, trusted_forwarders=trusted) as (_, server),
            stub_of(settings_of("front", tls_dir), server.port, "back") as stub,
        ):
            with identity.acting_as(user):
                await stub.Say(StringValue())
        assert echo.caller is not None
        assert (echo.caller.service, echo.caller.tenant) == ("front", believed)
        assert echo.caller.roles == (frozenset({"admin"}) if believed else frozenset())


async def test_a_channel_drops_identity_that_came_from_elsewhere(tls_dir: Path) -> None:
    echo = Witness()
    forged = [(identity.TENANT_KEY, "p1"), (identity.ROLES_KEY, "admin")]
    async with (
        serving(settings_of("back", tls_dir), echo, trusted_forwarders={"front"}) as (_, server),
        stub_of(settings_of("front", tls_dir), server.port, "back") as stub,
    ):
        await stub.Say(StringValue(), metadata=forged)
    assert echo.caller == Caller(service="front")


async def test_without_a_certificate_nobody_gets_in(tls_dir: Path) -> None:
    async with serving(settings_of("back", tls_dir), Echo()) as (_, server):
        trust = grpc.ssl_channel_credentials((tls_dir / "ca.pem").read_bytes())
        options = [("grpc.ssl_target_name_override", "back")]
        async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", trust, options=options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw_call(channel, f"/{SERVICE}/Say")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_peer_with_another_name_is_not_taken_for_the_service(tls_dir: Path) -> None:
    async with (
        serving(settings_of("back", tls_dir), Echo()) as (_, server),
        stub_of(settings_of("front", tls_dir), server.port, "middle") as stub,
    ):
        with pytest.raises(Unavailable):
            await stub.Say(StringValue())


async def test_a_public_server_asks_its_authenticator_and_nobody_else(tls_dir: Path) -> None:
    async def authenticate(metadata: Mapping[str, str], method: str) -> Caller:
        if metadata.get("authorization") != "Bearer right":
            raise Unauthenticated("API_KEY_INVALID", "no such key")
        return Caller(service="", tenant="p1")

    echo = Witness()
    settings = settings_of("back", tls_dir)
    async with (
        serving(settings, echo, public=True, authenticate=authenticate, trusted_forwarders={""}) as (_, server),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        say = raw_call(channel, f"/{SERVICE}/Say")
        forged = (("authorization", "Bearer wrong"), (identity.TENANT_KEY, "p2"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await say(b"", metadata=forged)
        await say(b"", metadata=(("authorization", "Bearer right"), (identity.TENANT_KEY, "p2")))
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert echo.caller == Caller(service="", tenant="p1")
    assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_public_server_with_a_certificate_asks_for_none(tls_dir: Path) -> None:
    files = {"public_certificate_file": tls_dir / "back.pem", "public_key_file": tls_dir / "back.key"}
    trust = grpc.ssl_channel_credentials((tls_dir / "ca.pem").read_bytes())
    async with (
        serving(settings_of("back", tls_dir, **files), Echo(), public=True) as (_, server),
        grpc.aio.secure_channel(f"localhost:{server.port}", trust) as channel,
    ):
        assert await raw_call(channel, f"/{SERVICE}/Say")(b"") == b""


async def test_health_and_reflection_are_open_to_any_peer(tls_dir: Path) -> None:
    async with serving(settings_of("back", tls_dir), Echo(), serving=False) as (_, server):
        stranger = settings_of("stranger", tls_dir)
        async with open_channel(stranger, f"127.0.0.1:{server.port}", "back") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await server.set_serving(True)
            assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            answers = [answer async for answer in stub.ServerReflectionInfo(iter([ask]))]
    assert SERVICE in {service.name for service in answers[0].list_services_response.service}


async def test_each_hop_sees_less_of_the_deadline(tls_dir: Path) -> None:
    echo = Witness()
    async with (
        serving(settings_of("back", tls_dir), echo) as (_, server),
        stub_of(settings_of("front", tls_dir, deadline_shave_s=0.5), server.port, "back") as stub,
    ):
        # Wide enough for a slow handshake, and no two of them alike.
        with deadline.limit(100):
            await stub.Say(StringValue())
        assert echo.remaining_s is not None
        assert 50 < echo.remaining_s <= 99.5
        await stub.Say(StringValue())
        assert 15 < echo.remaining_s <= 30.1  # gRPC rounds up on the wire.
        with deadline.limit(100):
            await stub.Say(StringValue(), timeout=5)
        assert echo.remaining_s <= 5.01  # It rounds up by a hundredth there.


async def test_too_short_a_deadline_is_refused_before_work(tls_dir: Path) -> None:
    echo = Witness()
    async with (
        serving(settings_of("back", tls_dir, deadline_min_s=5), echo) as (_, server),
        stub_of(settings_of("front", tls_dir), server.port, "back") as stub,
    ):
        with pytest.raises(DeadlineExceeded) as there:
            await stub.Say(StringValue(), timeout=2)
        with deadline.limit(0.04), pytest.raises(DeadlineExceeded) as here:
            await stub.Say(StringValue())
    assert there.value.reason == here.value.reason == "DEADLINE_TOO_SHORT"
    assert echo.calls == 0


async def test_a_call_without_a_deadline_gets_the_servers(tls_dir: Path) -> None:
    echo = Witness()
    echo.slow = True
    async with (
        serving(settings_of("back", tls_dir, default_deadline_s=0.1), echo, public=True) as (_, server),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw_call(channel, f"/{SERVICE}/Say")(b"")
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert echo.ended.is_set()


@pytest.mark.parametrize(("client_max", "server_max"), [(1 << 20, 1024), (1024, 1 << 20)])
async def test_an_oversize_message_names_the_limit(tls_dir: Path, client_max: int, server_max: int) -> None:
    async with serving(settings_of("back", tls_dir, message_size_bytes_max=server_max), Echo()) as (_, server):
        front = settings_of("front", tls_dir, message_size_bytes_max=client_max)
        async with stub_of(front, server.port, "back") as stub:
            with pytest.raises(ResourceExhausted) as caught:
                await stub.Say(StringValue(value="x" * 5000))
            assert (await stub.Say(StringValue(value="x"))).value == "x"
    assert caught.value.reason == "SIZE_LIMIT"
    assert caught.value.metadata["limit_bytes"] == "1024"


async def test_a_method_that_nobody_implements_is_not_offered(tls_dir: Path) -> None:
    async with (
        serving(settings_of("back", tls_dir), Echo()) as (_, server),
        open_channel(settings_of("front", tls_dir), f"127.0.0.1:{server.port}", "back") as channel,
    ):
        for method in (f"/{SERVICE}/Nothing", "/grpc.health.v1.Health/List"):
            with pytest.raises(Unimplemented) as caught:
                await raw_call(channel, method)(b"")
            assert caught.value.reason == "NOT_OFFERED"


async def test_leaving_a_stream_cancels_the_call(tls_dir: Path) -> None:
    echo = Witness()
    async with (
        serving(settings_of("back", tls_dir), echo) as (_, server),
        stub_of(settings_of("front", tls_dir), server.port, "back") as stub,
    ):
        stream = stub.Count(StringValue())
        iterator: Any = aiter(stream)
        async with contextlib.aclosing(iterator) as responses:
            async for _ in responses:
                break
        async with asyncio.timeout(WAIT_S_MAX):
            await echo.ended.wait()


async def test_cancelling_a_caller_cancels_the_handler(tls_dir: Path) -> None:
    echo = Witness()
    echo.slow = True
    async with (
        serving(settings_of("back", tls_dir), echo) as (_, server),
        stub_of(settings_of("front", tls_dir), server.port, "back") as stub,
    ):
        call = asyncio.ensure_future(stub.Say(StringValue()))
        await echo.began.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(WAIT_S_MAX):
            await echo.ended.wait()


async def test_a_failing_request_stream_raises_its_own_error(tls_dir: Path) -> None:
    async def requests() -> AsyncIterator[StringValue]:
        yield StringValue(value="a")
        raise ValueError("the file went away")

    async with (
        serving(settings_of("back", tls_dir), Echo()) as (_, server),
        stub_of(settings_of("front", tls_dir), server.port, "back") as stub,
    ):
        with pytest.raises(ValueError, match="went away"):
            await stub.Join(requests())
        with pytest.raises(ValueError, match="went away"):
            async for _ in stub.Talk(requests()):
                pass


async def test_both_halves_of_a_stream_by_hand(tls_dir: Path) -> None:
    async with (
        serving(settings_of("back", tls_dir), Echo()) as (_, server),
        stub_of(settings_of("front", tls_dir), server.port, "back") as stub,
    ):
        talk: Any = stub.Talk()
        await talk.write(StringValue(value="one"))
        assert (await talk.read()).value == "one"
        await talk.done_writing()
        assert await talk.read() is grpc.aio.EOF
        join = stub.Join()
        await join.write(StringValue(value="one"))
        await join.done_writing()
        assert (await join).value == "one"


async def test_a_drain_ends_endless_streams_at_once_with_a_typed_error(tls_dir: Path) -> None:
    echo = Witness()
    async with (
        serving(settings_of("back", tls_dir, drain_grace_s=60), echo, endless={"Count"}) as (process, server),
        stub_of(settings_of("front", tls_dir), server.port, "back") as stub,
    ):
        stream = stub.Count(StringValue())
        await stream.read()
        process.stop()
        async with asyncio.timeout(WAIT_S_MAX):
            with pytest.raises(Unavailable) as caught:
                await stream.read()
    assert caught.value.retry_after_s is not None
    assert echo.ended.is_set()


class Interrupted(Echo):
    """A drain begins in the middle of its first write."""

    async def Count(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        asyncio.get_running_loop().call_soon(self.drain)
        yield StringValue(value="0")
        await asyncio.Event().wait()

    def drain(self) -> None:
        raise NotImplementedError


async def test_a_drain_meets_a_write_in_its_middle(tls_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    echo = Interrupted()
    async with (
        serving(settings_of("back", tls_dir), echo, endless={"Count"}) as (_, server),
        stub_of(settings_of("front", tls_dir), server.port, "back") as stub,
    ):
        monkeypatch.setattr(echo, "drain", server._endless_calls.end)
        with pytest.raises(Unavailable) as caught:
            async for _ in stub.Count(StringValue(), timeout=WAIT_S_MAX):
                pass
    assert caught.value.retry_after_s is not None


async def test_a_drain_lets_calls_finish_and_cancels_those_that_do_not(tls_dir: Path) -> None:
    echo = Witness()
    echo.slow = True
    async with (
        serving(settings_of("back", tls_dir, drain_grace_s=0.5), echo) as (process, server),
        stub_of(settings_of("front", tls_dir), server.port, "back") as stub,
    ):
        saying: Any = stub.Say(StringValue())
        call = asyncio.create_task(saying)
        await echo.began.wait()
        process.stop()
        with pytest.raises((Cancelled, Unavailable)):
            await call
    assert echo.ended.is_set()


async def test_a_proxy_handler_is_guarded_like_any_other(tls_dir: Path) -> None:
    class Mirror(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            if not details.method.startswith("/proxied."):
                return None

            async def answer(request: bytes, context: object) -> bytes:
                return f"{identity.current_caller().service} {details.method}".encode()

            return grpc.unary_unary_rpc_method_handler(answer)

    settings = settings_of("back", tls_dir)
    async with living(settings) as process:
        server = ServerBuilder(process, settings)
        server.add_generic(Mirror(), allow={"front"})
        server.announce("proxied.v1.Service")
        target = f"127.0.0.1:{await server.start()}"
        async with open_channel(settings_of("front", tls_dir), target, "back") as channel:
            assert await raw_call(channel, "/proxied.v1.Service/A")(b"") == b"front /proxied.v1.Service/A"
            with pytest.raises(Unimplemented):
                await raw_call(channel, "/other.v1.Service/A")(b"")
        async with open_channel(settings_of("stranger", tls_dir), target, "back") as channel:
            with pytest.raises(PermissionDenied):
                await raw_call(channel, "/proxied.v1.Service/A")(b"")


async def test_the_port_file_and_a_taken_port(tls_dir: Path, tmp_path: Path) -> None:
    settings = settings_of("back", tls_dir, port_file=tmp_path / "port")
    async with serving(settings, Echo()) as (process, server):
        assert int((tmp_path / "port").read_text()) == server.port
        taken = ServerBuilder(process, settings, listen_address=f"127.0.0.1:{server.port}")
        with pytest.raises(RuntimeError):
            await taken.start()


async def test_synchronous_handlers_are_refused_when_registered(tls_dir: Path) -> None:
    class Blocking(Echo):
        def Say(self, request: StringValue, context: object) -> StringValue:  # type: ignore[override]
            return request

    settings = settings_of("back", tls_dir)
    async with living(settings) as process:
        with pytest.raises(TypeError, match="async"):
            ServerBuilder(process, settings).add(add_echo_to_server, Blocking(), SERVICE, {"front"})
        with pytest.raises(ValueError, match="announced"):
            ServerBuilder(process, settings).add(add_echo_to_server, Echo(), "test.other.v1.X", {"front"})
