"""Bytes that are no message and text that cannot be kept are typed refusals, on every shape of call; and no more is."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2

from chassis import errors, identity
from chassis.errors import InvalidArgument
from chassis.identity import Caller
from chassis.process import Process
from chassis.rpc.request_gate import admit
from chassis.rpc.server import ServerBuilder
from finemesh.tuning.v1 import tuning_service_pb2
from tests.harness.living import living

from .echo import SERVICE, Echo, add_echo_to_server, settings_of, stub_of

# A length that its message does not have, a group without an end, a text that is no UTF-8.
NO_MESSAGES = (b"\x0a\x7fshort", b"\x0b", b"\x0a\x02\xff\xfe")
USER = Caller(service="", tenant="p1", account="o1", subject="k1")


async def refusal(call: Any) -> InvalidArgument:
    try:
        if isinstance(call, grpc.aio.UnaryUnaryCall | grpc.aio.StreamUnaryCall):
            await call
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        typed = errors.unpack(error)
        assert isinstance(typed, InvalidArgument), (typed, error.details())
        assert "DecodeError" not in str(error.details())
        return typed
    raise AssertionError("the call was not refused")


@pytest.mark.parametrize("content", NO_MESSAGES)
async def test_bytes_that_are_no_message_are_refused_by_every_shape_of_call(tls_dir: Path, content: bytes) -> None:
    settings = settings_of("back", tls_dir)
    async with living(settings) as process, public_echo(process) as channel:
        await refusal(channel.unary_unary(f"/{SERVICE}/Say")(content))
        await refusal(channel.unary_stream(f"/{SERVICE}/Count")(content))
        await refusal(channel.stream_unary(f"/{SERVICE}/Join")(iter([b"", content])))
        await refusal(channel.stream_stream(f"/{SERVICE}/Talk")(iter([b"", content])))
        await refusal(channel.unary_unary("/grpc.health.v1.Health/Check")(content))
        answer = await channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
        assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING


async def test_text_that_cannot_be_kept_is_refused_on_a_public_server(tls_dir: Path) -> None:
    nul = StringValue(value="a\0b").SerializeToString()
    async with living(settings_of("back", tls_dir)) as process, public_echo(process) as channel:
        for call in (
            channel.unary_unary(f"/{SERVICE}/Say")(nul),
            channel.stream_unary(f"/{SERVICE}/Join")(iter([nul])),
        ):
            assert [violation.field for violation in (await refusal(call)).violations] == ["value"]


async def test_a_peer_is_refused_such_text_only_where_it_speaks_for_a_user(tls_dir: Path) -> None:
    nul = StringValue(value="a\0b")
    async with living(settings_of("back", tls_dir)) as process:
        builder = ServerBuilder(process, process.settings, trusted_forwarders={"front"})
        builder.add(add_echo_to_server, Echo(), SERVICE, {"front"})
        await builder.start()
        async with stub_of(settings_of("front", tls_dir), builder.port, "back") as stub:
            assert await stub.Say(nul) == nul
            with identity.acting_as(USER), pytest.raises(InvalidArgument, match="NUL"):
                await stub.Say(nul)


def test_every_text_that_cannot_be_kept_is_named_by_its_path() -> None:
    request = tuning_service_pb2.CreateTuningJobRequest(request_id="fine", parent="a\0")
    request.spec.base_model = "\0"
    assert _refused_fields(request) == ["parent", "spec.base_model"]
    struct = Struct()
    struct.update({"list": ["fine", {"inner": "\0"}], "key\0": 1})
    assert sorted(_refused_fields(struct)) == [
        r"fields['key\x00']",
        "fields['list'].list_value.values[1].struct_value.fields['inner'].string_value",
    ]


def test_zeros_that_are_no_text_pass() -> None:
    request = StringValue(value="fine")
    unknown = request.SerializeToString() + b"\x79" + bytes(8)
    assert admit(StringValue.FromString, unknown, from_user=True).value == "fine"


def _refused_fields(message: Any) -> list[str]:
    with pytest.raises(InvalidArgument) as caught:
        admit(type(message).FromString, message.SerializeToString(), from_user=True)
    return [violation.field for violation in caught.value.violations]


@contextlib.asynccontextmanager
async def public_echo(process: Process) -> AsyncIterator[Any]:
    """A channel to it, for bytes."""
    builder = ServerBuilder(process, process.settings, public=True)
    builder.add(add_echo_to_server, Reading(), SERVICE, ())
    port = await builder.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


class Reading(Echo):
    """Reads its whole request before it answers."""

    async def Talk(self, requests: AsyncIterator[StringValue], context: object) -> AsyncIterator[StringValue]:
        for request in [request async for request in requests]:
            yield request
