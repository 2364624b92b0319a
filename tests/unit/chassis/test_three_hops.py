"""Errors, identity and trace over three real hops: front -> middle -> back, each a real server with mutual TLS."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2

from chassis import errors, identity
from chassis.errors import DomainError, FieldViolation, Internal, Unavailable
from chassis.identity import Caller
from chassis.rpc.server import ServerBuilder
from chassis.telemetry import trace as telemetry
from tests.harness.living import living
from tests.harness.raw_calls import raw_call

from .echo import SERVICE, Echo, EchoStub, add_echo_to_server, settings_of, stub_of

DOMAIN_ERRORS = [kind for kind in DomainError.__subclasses__()]
USER = Caller(service="", tenant="p1", account="o1", subject="k1", roles=frozenset({"admin", "member"}))


class Relay(Echo):
    def __init__(self, stub: EchoStub) -> None:
        self.stub = stub

    async def Say(self, request: StringValue, context: object) -> StringValue:
        return await self.stub.Say(request)

    async def Count(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        async for response in self.stub.Count(request):
            yield response


@contextlib.asynccontextmanager
async def three_hops(tls_dir: Path, back: Echo) -> AsyncIterator[EchoStub]:
    front, middle, last = (settings_of(name, tls_dir) for name in ("front", "middle", "back"))
    async with contextlib.AsyncExitStack() as stack:
        port, peer = 0, ""
        relay = back
        for settings, caller in ((last, "middle"), (middle, "front"), (front, "stranger")):
            process = await stack.enter_async_context(living(settings))
            builder = ServerBuilder(process, settings, trusted_forwarders={caller})
            if peer:
                relay = Relay(await stack.enter_async_context(stub_of(settings, port, peer)))
            builder.add(add_echo_to_server, relay, SERVICE, {caller})
            port, peer = await builder.start(), settings.service_name
        yield await stack.enter_async_context(stub_of(settings_of("stranger", tls_dir), port, peer))


class Failing(Echo):
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def Say(self, request: StringValue, context: object) -> StringValue:
        raise self.error

    async def Count(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        yield StringValue(value="before")
        raise self.error


async def test_every_class_survives_with_all_its_details(tls_dir: Path) -> None:
    back = Failing(RuntimeError())
    async with three_hops(tls_dir, back) as stub:
        for kind in DOMAIN_ERRORS:
            back.error = kind(
                "SIZE_LIMIT",
                f"grüße from {kind.__name__}",
                violations=[FieldViolation("line 12: $.messages[0].role", "expected user, got ✗")],
                metadata={"limit": "lines"},
                retry_after_s=1.5,
            )
            with pytest.raises(kind) as caught:
                await stub.Say(StringValue())
            assert type(caught.value) is kind
            assert vars(caught.value) == vars(back.error)


async def test_an_error_in_the_middle_of_a_stream_is_typed_too(tls_dir: Path) -> None:
    seen = []
    async with three_hops(tls_dir, Failing(errors.OutOfRange("CONTEXT_TOO_LONG", "too long"))) as stub:
        with pytest.raises(errors.OutOfRange) as caught:
            async for response in stub.Count(StringValue()):
                seen += [response.value]
    assert seen == ["before"]
    assert caught.value.reason == "CONTEXT_TOO_LONG"


async def test_an_untyped_failure_travels_as_a_trace_id_only(tls_dir: Path) -> None:
    async with three_hops(tls_dir, Failing(KeyError("password=hunter2"))) as stub:
        traceparent = telemetry.new_traceparent()
        with telemetry.span("test", traceparent), pytest.raises(Internal) as caught:
            await stub.Say(StringValue())
    assert caught.value.reason == "INTERNAL"
    assert "hunter2" not in str(caught.value)
    assert traceparent[3:35] in caught.value.message


async def test_a_lost_dependency_is_unavailable(tls_dir: Path) -> None:
    async with three_hops(tls_dir, Failing(ConnectionRefusedError("10.0.0.7:5432"))) as stub:
        with pytest.raises(Unavailable) as caught:
            await stub.Say(StringValue())
    assert caught.value.reason == "DEPENDENCY_UNAVAILABLE"
    assert "10.0.0.7" not in caught.value.message


async def test_a_dead_peer_is_unavailable_and_its_address_stays_here(tls_dir: Path) -> None:
    async with stub_of(settings_of("front", tls_dir), 1, "back") as stub:
        with pytest.raises(Unavailable) as caught:
            await stub.Say(StringValue())
    assert caught.value.reason == "DEPENDENCY_UNAVAILABLE"
    assert "127.0.0.1" not in caught.value.message


async def test_identity_and_trace_reach_the_last_hop(tls_dir: Path) -> None:
    class Witness(Echo):
        async def Say(self, request: StringValue, context: object) -> StringValue:
            self.caller, self.trace_id = identity.current_caller(), telemetry.current_trace_id()
            return request

    back = Witness()
    traceparent = telemetry.new_traceparent()
    async with three_hops(tls_dir, back) as stub:
        with identity.acting_as(USER), telemetry.span("test", traceparent):
            await stub.Say(StringValue())
    assert back.caller == Caller(service="middle", tenant="p1", account="o1", subject="k1", roles=USER.roles)
    assert back.trace_id == traceparent[3:35]


async def test_many_violations_are_counted_where_they_do_not_fit() -> None:
    error = errors.InvalidArgument(
        "DATASET_INVALID", "bad lines", violations=[FieldViolation(f"line {n}: $", "x" * 50) for n in range(5000)]
    )
    status = errors.pack(error)
    assert status.ByteSize() <= errors.DETAILS_BYTES_MAX
    found = errors.unpack(
        grpc.aio.AioRpcError(
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.aio.Metadata(),
            grpc.aio.Metadata((errors.DETAILS_KEY, status.SerializeToString())),
        )
    )
    assert len(found.violations) + int(found.metadata["violations_omitted"]) == 5000
    assert len(found.violations) > 20


async def test_the_largest_error_reaches_a_client_with_stock_limits(tls_dir: Path) -> None:
    violations = [FieldViolation(f"line {n}: $", "誤" * 50) for n in range(5000)]
    largest = errors.InvalidArgument(
        "DATASET_INVALID", "誤" * 5000, violations=violations, metadata={"file": "誤" * 5000}, retry_after_s=1
    )
    settings = settings_of("back", tls_dir)
    async with living(settings) as process:
        server = ServerBuilder(process, settings, public=True)
        server.add(add_echo_to_server, Failing(largest), SERVICE, ())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
            for _ in range(20):  # Between its soft and its hard limit gRPC refuses at random.
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await raw_call(channel, f"/{SERVICE}/Say")(b"")
                assert errors.unpack(caught.value).violations


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_a_status_without_details_becomes_a_typed_error(code: grpc.StatusCode) -> None:
    bare = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "ipv4:10.0.0.7:1 said no")
    typed = errors.unpack(bare)
    assert typed.code in (code, grpc.StatusCode.INTERNAL)
    assert "10.0.0.7" not in typed.message


def test_a_stream_that_was_answered_while_it_was_sent_may_be_tried_again() -> None:
    bare = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "Internal error from Core"
    )
    assert errors.unpack(bare).reason == "DEPENDENCY_UNAVAILABLE"


def test_an_error_that_quotes_half_a_surrogate_pair_is_told_all_the_same() -> None:
    bad, told = "row 3: '\ud83d\0'", "row 3: '?\0'"
    error = errors.InvalidArgument(
        "DATASET_INVALID", bad, violations=[errors.FieldViolation(bad, bad)], metadata={"a\ud800": bad}
    )
    status = errors.pack(error)
    assert status.message == told
    bad_request, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(bad_request)
    assert status.details[1].Unpack(info)
    assert [(each.field, each.description) for each in bad_request.field_violations] == [(told, told)]
    assert dict(info.metadata) == {"a?": told}
