"""A service of our own making, with one method of each shape, registered as generated code does it."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue

from chassis.rpc.channel import open_channel
from chassis.settings import ChassisSettings

SERVICE = "test.echo.v1.EchoService"


def settings_of(service: str, tls_dir: Path, **values: Any) -> ChassisSettings:
    return ChassisSettings(service_name=service, tls_dir=tls_dir, **values)


class Echo:
    """Answers with what it was sent; tests override what they are about."""

    async def Say(self, request: StringValue, context: object) -> StringValue:
        return request

    async def Count(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        for number in range(int(request.value)):
            yield StringValue(value=str(number))

    async def Join(self, requests: AsyncIterator[StringValue], context: object) -> StringValue:
        return StringValue(value="".join([request.value async for request in requests]))

    async def Talk(self, requests: AsyncIterator[StringValue], context: object) -> AsyncIterator[StringValue]:
        async for request in requests:
            yield request


def add_echo_to_server(echo: Echo, server: Any) -> None:
    coders: dict[str, Any] = {
        "request_deserializer": StringValue.FromString,
        "response_serializer": StringValue.SerializeToString,
    }
    server.add_registered_method_handlers(
        SERVICE,
        {
            "Say": grpc.unary_unary_rpc_method_handler(echo.Say, **coders),
            "Count": grpc.unary_stream_rpc_method_handler(echo.Count, **coders),
            "Join": grpc.stream_unary_rpc_method_handler(echo.Join, **coders),
            "Talk": grpc.stream_stream_rpc_method_handler(echo.Talk, **coders),
        },
    )


class EchoStub:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        coders: dict[str, Any] = {
            "request_serializer": StringValue.SerializeToString,
            "response_deserializer": StringValue.FromString,
        }
        self.Say: grpc.aio.UnaryUnaryMultiCallable[Any, Any] = channel.unary_unary(f"/{SERVICE}/Say", **coders)
        self.Count: grpc.aio.UnaryStreamMultiCallable[Any, Any] = channel.unary_stream(f"/{SERVICE}/Count", **coders)
        self.Join: grpc.aio.StreamUnaryMultiCallable[Any, Any] = channel.stream_unary(f"/{SERVICE}/Join", **coders)
        self.Talk: grpc.aio.StreamStreamMultiCallable[Any, Any] = channel.stream_stream(f"/{SERVICE}/Talk", **coders)


@contextlib.asynccontextmanager
async def stub_of(settings: ChassisSettings, port: int, service: str) -> AsyncIterator[EchoStub]:
    async with open_channel(settings, f"127.0.0.1:{port}", service) as channel:
        yield EchoStub(channel)
