"""Channels to other services of the mesh: mTLS, the caller's identity, trace and deadline; errors come back typed.

The calls are wrapped where a stub takes them from the channel, not by grpc.aio client interceptors: those start a task
and build a second call object for each call. One that does nothing measured 15 to 20 % of the CPU time of a unary call
over TLS, as much as everything that this file and `chassis.rpc.guard` do together.
"""

import asyncio
import math
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Generator, Iterable, Sequence
from typing import Any

import grpc
from opentelemetry.trace import Span, SpanKind

from chassis import identity, pki
from chassis.errors import DeadlineExceeded, DomainError, unpack
from chassis.rpc import deadline
from chassis.rpc.replicas import Replicas, split_addresses
from chassis.settings import ChassisSettings
from chassis.telemetry import trace as telemetry

Metadata = Sequence[tuple[str, str | bytes]]
# For a stream that lives as long as its process, such as a heartbeat. Every other call ends some day.
NO_DEADLINE = math.inf
# gRPC writes a deadline with two to three digits and rounds up; a hop that shaved less than that would lengthen it.
_ROUNDING_SHARE = 0.01
# All addresses behind a name are connected, and those that are take turns.
_TURNS = '{"loadBalancingConfig": [{"round_robin": {}}]}'


def open_channel(settings: ChassisSettings, target: str, service: str) -> grpc.aio.Channel:
    """A channel to the server at `target` (host:port, or those of several replicas with commas between), which must
    show the certificate of `service`. A name with several addresses counts as so many replicas.

    A peer that is gone or frozen costs a call at most `keepalive_s` and `keepalive_timeout_s` together; the calls after
    it go to the other replicas.
    """
    credentials = pki.load(settings.tls_dir, settings.service_name).for_channel()
    backoff_ms = int(settings.reconnect_backoff_s_max * 1000)
    options: list[tuple[str, Any]] = [
        ("grpc.ssl_target_name_override", service),
        ("grpc.default_authority", service),
        ("grpc.max_receive_message_length", settings.message_size_bytes_max),
        ("grpc.max_send_message_length", settings.message_size_bytes_max),
        ("grpc.max_metadata_size", settings.metadata_size_bytes_max),
        # A peer that was restarted is back within a second; gRPC's own default waits up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", min(100, backoff_ms)),
        # In spite of its name the limit of one connection attempt, and no pause: a busy machine takes its time over a
        # TLS handshake.
        ("grpc.min_reconnect_backoff_ms", int(settings.connect_timeout_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", backoff_ms),
        ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        # gRPC's core goes by this one alone, a minute by default, whatever the one above says (seen with 1.85).
        ("grpc.http2.ping_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        # Else a peer that froze while nobody called would be found by the next caller only.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.service_config", _TURNS),
        # A new channel is a new connection, also to an address that another channel of this process is stuck at.
        ("grpc.use_local_subchannel_pool", 1),
        # The mesh's addresses are its own; a proxy of the environment is for the way out.
        ("grpc.enable_http_proxy", 0),
    ]
    addresses = split_addresses(target) or [target]
    replicas = Replicas([grpc.aio.secure_channel(each, credentials, options=options) for each in addresses])
    return MeshChannel(replicas, settings)


class MeshChannel(grpc.aio.Channel):
    """What stubs see as a channel. Unary calls are plain coroutines; calls with a stream are `MeshStream`s.

    `timeout=None` means what remains of the call being served, shaved, or the settings' default outside of one.
    """

    def __init__(self, replicas: Replicas, settings: ChassisSettings) -> None:
        self._replicas = replicas
        self._settings = settings
        self._exporting = settings.otlp_endpoint is not None

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        inner = [channel.unary_unary(method, *args, **kwargs) for channel in self._replicas.channels]

        async def call(request: Any, *, timeout: float | None = None, metadata: Metadata = (), **options: Any) -> Any:
            span = self._begin_span(method)
            timeout_s = self._timeout_s(timeout, self._settings.default_deadline_s)
            try:
                response = await inner[self._replicas.pick()](
                    request, timeout=timeout_s, metadata=_outgoing(metadata, span), **options
                )
            except grpc.aio.AioRpcError as error:
                raise _told(error, span) from error
            _end(span)
            return response

        return call

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        inner = [channel.unary_stream(method, *args, **kwargs) for channel in self._replicas.channels]

        def call(request: Any, *, timeout: float | None = None, metadata: Metadata = (), **options: Any) -> MeshStream:
            span = self._begin_span(method)
            timeout_s = self._timeout_s(timeout, self._settings.stream_deadline_s)
            started = inner[self._replicas.pick()](
                request, timeout=timeout_s, metadata=_outgoing(metadata, span), **options
            )
            return MeshStream(started, None, span)

        return call

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        inner = [channel.stream_unary(method, *args, **kwargs) for channel in self._replicas.channels]
        return self._with_request_stream(method, inner)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        inner = [channel.stream_stream(method, *args, **kwargs) for channel in self._replicas.channels]
        return self._with_request_stream(method, inner)

    def _with_request_stream(self, method: str, inner: Sequence[Any]) -> Any:
        def call(
            requests: Any = None, *, timeout: float | None = None, metadata: Metadata = (), **options: Any
        ) -> MeshStream:
            span = self._begin_span(method)
            timeout_s = self._timeout_s(timeout, self._settings.stream_deadline_s)
            watched = None if requests is None else _Requests(requests)
            started = inner[self._replicas.pick()](
                watched, timeout=timeout_s, metadata=_outgoing(metadata, span), **options
            )
            return MeshStream(started, watched, span)

        return call

    def _timeout_s(self, wanted_s: float | None, default_s: float) -> float | None:
        remaining_s = deadline.remaining_s()
        if remaining_s is not None:
            left_s = remaining_s - max(self._settings.deadline_shave_s, remaining_s * _ROUNDING_SHARE)
            wanted_s = left_s if wanted_s is None else min(wanted_s, left_s)
        elif wanted_s is None:
            wanted_s = default_s
        if wanted_s < self._settings.deadline_min_s:
            raise DeadlineExceeded(
                "DEADLINE_TOO_SHORT", "too little of the deadline is left for the next hop; allow the call more time"
            )
        return None if wanted_s == NO_DEADLINE else wanted_s

    def _begin_span(self, method: str) -> Span | None:
        if not self._exporting:
            return None
        parent = telemetry.current_traceparent() or telemetry.new_traceparent()
        return telemetry.begin_span(method, SpanKind.CLIENT, parent)

    async def close(self, grace: float | None = None) -> None:
        await self._replicas.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Of the first address."""
        return self._replicas.channels[0].get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._replicas.channels[0].wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._replicas.channels[0].channel_ready()

    async def __aenter__(self) -> "MeshChannel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class MeshStream:
    """A started call with a stream on either side: iterate it, `read`, `write` and `done_writing`, or await its one
    response; errors are typed. Leaving the iteration early cancels the call."""

    def __init__(self, inner: Any, requests: "_Requests | None", span: Span | None) -> None:
        self._inner = inner
        self._requests = requests
        self._span = span

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for response in self._inner:
                yield response
        except grpc.aio.AioRpcError as error:
            raise _told(error, self._span) from error
        except asyncio.CancelledError as error:
            self._raise_request_failure(error)
            raise
        finally:
            self._inner.cancel()
        _end(self._span)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._response().__await__()

    async def read(self) -> Any:
        """The next response, or `grpc.aio.EOF`."""
        return await self._guarded(self._inner.read())

    async def write(self, request: Any) -> None:
        await self._guarded(self._inner.write(request))

    async def done_writing(self) -> None:
        await self._guarded(self._inner.done_writing())

    def cancel(self) -> bool:
        cancelled: bool = self._inner.cancel()
        return cancelled

    def __getattr__(self, name: str) -> Any:
        # initial_metadata, trailing_metadata, code, done and so on are those of gRPC's own call.
        return getattr(self._inner, name)

    async def _response(self) -> Any:
        response = await self._guarded(self._inner)
        _end(self._span)
        return response

    async def _guarded(self, step: Awaitable[Any]) -> Any:
        try:
            return await step
        except grpc.aio.AioRpcError as error:
            raise _told(error, self._span) from error
        except asyncio.CancelledError as error:
            self._raise_request_failure(error)
            raise

    def _raise_request_failure(self, error: BaseException) -> None:
        """gRPC cancels a call whose request iterator failed and drops the reason; the reason is what matters here."""
        _end(self._span, "CANCELLED")
        if self._requests is not None and self._requests.failure is not None:
            raise self._requests.failure from error


class _Requests:
    """Passes a request iterator on to gRPC and keeps what it failed with."""

    def __init__(self, inner: AsyncIterable[Any] | Iterable[Any]) -> None:
        self._inner = inner
        self.failure: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            if isinstance(self._inner, AsyncIterable):
                async for request in self._inner:
                    yield request
            else:
                for request in self._inner:
                    yield request
        except Exception as error:
            self.failure = error
            raise


def _outgoing(metadata: Metadata, span: Span | None) -> tuple[tuple[str, str | bytes], ...]:
    # Identity is ours to state: what a caller of this channel copied from elsewhere must not pass for it.
    pairs = [pair for pair in metadata if pair[0] not in identity.IDENTITY_KEYS] if metadata else []
    caller = identity.caller_or_none()
    if caller is not None:
        pairs += identity.metadata_of(caller)
    if span is not None:
        pairs.append((telemetry.TRACEPARENT_KEY, telemetry.traceparent_of(span)))
    else:
        pairs.append((telemetry.TRACEPARENT_KEY, telemetry.current_traceparent() or telemetry.new_traceparent()))
    return tuple(pairs)


def _told(error: grpc.aio.AioRpcError, span: Span | None) -> DomainError:
    typed = unpack(error)
    _end(span, typed.reason)
    return typed


def _end(span: Span | None, error_type: str | None = None) -> None:
    if span is not None:
        telemetry.end_span(span, error_type)
