"""Asks a server of the mesh for its standard gRPC health, as the launcher's own certificate `operator`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import pki

OPERATOR = "operator"
POLL_S = 0.05
CALL_TIMEOUT_S = 2.0


async def wait_serving(credentials: pki.Credentials, address: str, service: str, component: str = "") -> None:
    """Returns when the server at `address` shows the certificate of `service` and says SERVING.

    With a `component`, when that part of it does, or when the server has no such part.
    """
    async with health_of(credentials, address, service) as ask:
        while True:
            try:
                if await ask(component) == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError as error:
                if component and error.code() is grpc.StatusCode.NOT_FOUND:
                    return
                # Not there yet, or starting over: whether to give up is the caller's timeout.
            await asyncio.sleep(POLL_S)


@asynccontextmanager
async def health_of(
    credentials: pki.Credentials, address: str, service: str
) -> AsyncIterator[Callable[[str], Awaitable[int]]]:
    """What asks that server, over one connection, for the status of a part by its name, or of all by ""."""
    options = [
        ("grpc.ssl_target_name_override", service),
        # A server that is about to listen is asked again at once, not after gRPC's patient second.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 100),
        ("grpc.enable_http_proxy", 0),
        # Channels to the same address share connections by default, and with them each other's backoff.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.secure_channel(address, credentials.for_channel(), options=options) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check

        async def ask(component: str) -> int:
            request = health_pb2.HealthCheckRequest(service=component)
            answer = await check(request, timeout=CALL_TIMEOUT_S, wait_for_ready=True)
            return int(answer.status)

        yield ask
