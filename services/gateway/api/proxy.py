"""Forwards the public methods of other services byte for byte: one handler for all of them. Not pure: gRPC.

It reads no message: who calls, the deadline, traces and the form of errors are the server's and the channel's work.
"""

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from chassis.identity import current_caller
from chassis.rpc.channel import NO_DEADLINE
from chassis.rpc.guard import Handler
from chassis.rpc.request_stream import whole
from services.gateway.identity.key_watch import KeyWatch

# A stream by this name lasts as long as what it watches.
_WATCH = "Watch"


class Proxy(grpc.GenericRpcHandler):
    """Serves every method of the given services by calling the same method on the service's channel."""

    def __init__(self, upstreams: Mapping[ServiceDescriptor, grpc.aio.Channel], key_watch: KeyWatch) -> None:
        self.service_names = [service.full_name for service in upstreams]
        self.endless = frozenset(
            method.name for service in upstreams for method in service.methods if _is_endless(method)
        )
        self._handlers = {
            f"/{service.full_name}/{method.name}": _forwarding(
                f"/{service.full_name}/{method.name}", method, channel, key_watch
            )
            for service, channel in upstreams.items()
            for method in service.methods
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        return self._handlers.get(handler_call_details.method)


def _is_endless(method: MethodDescriptor) -> bool:
    return method.server_streaming and method.name.startswith(_WATCH)


def _forwarding(path: str, method: MethodDescriptor, channel: Any, key_watch: KeyWatch) -> Handler:
    """A handler without serializers: gRPC then hands over and takes bytes. A call without a stream is answered even if
    its key is revoked meanwhile."""
    options = {"timeout": NO_DEADLINE} if _is_endless(method) else {}
    if method.client_streaming and method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(_talking(channel.stream_stream(path), options, key_watch))
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(_streaming(channel.unary_stream(path), options, key_watch))
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(_collecting(channel.stream_unary(path), key_watch))
    return grpc.unary_unary_rpc_method_handler(_unary(channel.unary_unary(path)))


def _unary(upstream: Any) -> Any:
    async def forward(request: bytes, _context: Any) -> Any:
        return await upstream(request)

    return forward


def _collecting(upstream: Any, key_watch: KeyWatch) -> Any:
    async def forward(requests: Any, context: Any) -> Any:
        call = upstream(whole(requests, context))
        try:
            with key_watch.over(current_caller().subject, call.cancel):
                return await call
        finally:
            # A client that is gone must not leave its call running upstream; after an answer this does nothing.
            call.cancel()

    return forward


def _streaming(upstream: Any, options: Mapping[str, float], key_watch: KeyWatch) -> Any:
    async def forward(request: bytes, context: Any) -> None:
        await _pass_on(upstream(request, **options), context, key_watch)

    return forward


def _talking(upstream: Any, options: Mapping[str, float], key_watch: KeyWatch) -> Any:
    async def forward(requests: Any, context: Any) -> None:
        # Not confirmed as whole: responses may have begun, and a conversation has no effect that waits for its end.
        await _pass_on(upstream(requests, **options), context, key_watch)

    return forward


async def _pass_on(call: Any, context: Any, key_watch: KeyWatch) -> None:
    try:
        # The call upstream is what a revocation ends, never a write that began: no status can be sent inside of one.
        with key_watch.over(current_caller().subject, call.cancel):
            # Reads the next message only once the client took the last: back-pressure reaches the upstream.
            async for response in call:
                await context.write(response)
    finally:
        call.cancel()
