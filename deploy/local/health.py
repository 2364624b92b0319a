"""Asks a server of the mesh for its standard gRPC health, as the launcher's own certificate `operator`."""

import asyncio

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
        while True:
            try:
                answer = await check(
                    health_pb2.HealthCheckRequest(service=component), timeout=CALL_TIMEOUT_S, wait_for_ready=True
                )
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError as error:
                if component and error.code() is grpc.StatusCode.NOT_FOUND:
                    return
                # Not there yet, or starting over: whether to give up is the caller's timeout.
            await asyncio.sleep(POLL_S)
