"""A mesh server in a process of its own that can be frozen: `python -m tests.harness.echo_process TLS_DIR PORT_FILE`.

Each call is answered with its process id.
"""

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue

from chassis.process import Process, run
from chassis.rpc.server import ServerBuilder
from chassis.settings import ChassisSettings

SERVICE = "test.echo.v1.EchoService"


async def say(request: StringValue, context: object) -> StringValue:
    return StringValue(value=str(os.getpid()))


async def count(request: StringValue, context: object) -> AsyncIterator[StringValue]:
    for _ in range(int(request.value)):
        yield StringValue(value=str(os.getpid()))


def register(_: object, server: Any) -> None:
    coders: dict[str, Any] = {
        "request_deserializer": StringValue.FromString,
        "response_serializer": StringValue.SerializeToString,
    }
    handlers = {
        "Say": grpc.unary_unary_rpc_method_handler(say, **coders),
        "Count": grpc.unary_stream_rpc_method_handler(count, **coders),
    }
    server.add_registered_method_handlers(SERVICE, handlers)


async def main(process: Process) -> None:
    server = ServerBuilder(process, process.settings)
    server.add(register, object(), SERVICE, {"front"})
    await server.start()


if __name__ == "__main__":
    settings = ChassisSettings(service_name="back", tls_dir=Path(sys.argv[1]), port_file=Path(sys.argv[2]))
    sys.exit(run(main, settings))
