"""What stands around every served call: who calls, until when, under which trace, and how its failure is told.

One wrapper per method, made when the method is registered, instead of a stack of interceptors that grpc.aio would walk
anew for each call. It knows no method by name. Its own work per call is about 20 microseconds.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc
import structlog
from opentelemetry.trace import Span, SpanKind

from chassis import errors, identity, pki
from chassis.errors import DeadlineExceeded, DomainError, PermissionDenied, Unauthenticated, Unavailable, Unimplemented
from chassis.identity import Caller
from chassis.rpc import deadline
from chassis.rpc.call_limits import CallLimits
from chassis.rpc.request_gate import Read, admit, admit_each
from chassis.rpc.untyped_errors import domain_error_of
from chassis.settings import ChassisSettings
from chassis.telemetry import trace as telemetry

log = structlog.get_logger()

Metadata = Mapping[str, str]
# Finds out who calls a public server, from the metadata and the full method name; raises Unauthenticated.
Authenticate = Callable[[Metadata, str], Awaitable[Caller]]
# What protobuf's generated code registers; the message types differ from method to method.
Behavior = Callable[[Any, Any], Any]
# From what gRPC hands over, bytes or a stream of them, to what the behavior takes.
Gate = Callable[[Any], Any]
if TYPE_CHECKING:
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]
else:
    # Generic in its type stub only.
    Handler = grpc.RpcMethodHandler

# Raised by gRPC itself where the call has ended already: aborted by its handler, or its client is gone.
_ENDED = (grpc.aio.AbortError, grpc.aio.InternalError)
# Failures that a caller cannot act on; a person has to read the log.
_TOLD_IN_LOG = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS})


@dataclass
class EndlessCalls:
    """The streams that end only by being told to; a drain tells them."""

    draining: bool = False
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def end(self) -> None:
        self.draining = True
        for task in self.tasks:
            task.cancel()


class _WholeWrites:
    """The context of an endless stream. A write that began is ended before a drain ends the call: no status can be sent
    in the middle of one."""

    def __init__(self, inner: Any, calls: EndlessCalls) -> None:
        self._inner = inner
        self._calls = calls

    async def write(self, message: Any) -> None:
        writing = asyncio.ensure_future(self._inner.write(message))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            if self._calls.draining:
                await asyncio.wait({writing})
            else:
                writing.cancel()
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """The rules of one service on one server."""

    settings: ChassisSettings
    limits: CallLimits
    # Names of peer services; None: any peer that has a certificate of the mesh.
    allow: frozenset[str] | None
    trusted_forwarders: frozenset[str] = frozenset()
    # A public server's callers have no certificate.
    public: bool = False
    authenticate: Authenticate | None = None
    # Methods, by their short names, without a default deadline.
    endless: frozenset[str] = frozenset()
    endless_calls: EndlessCalls = field(default_factory=EndlessCalls)

    def wrap(self, method: str, handler: Handler) -> Handler:
        """`method` is the full name, `/package.Service/Method`."""
        # Without a deserializer: gRPC hands over bytes, and the gate reads them.
        coders = {"response_serializer": handler.response_serializer}
        gate = partial(_gated_stream if handler.request_streaming else _gated, handler.request_deserializer)
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._streaming(method, handler.stream_stream, gate), **coders)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._streaming(method, handler.unary_stream, gate), **coders)
        if handler.request_streaming:
            limit_s = self.settings.stream_deadline_s
            answering = self._unary(method, handler.stream_unary, gate, limit_s, streams=True)
            return grpc.stream_unary_rpc_method_handler(answering, **coders)
        limit_s = self.settings.default_deadline_s
        answering = self._unary(method, handler.unary_unary, gate, limit_s, streams=False)
        return grpc.unary_unary_rpc_method_handler(answering, **coders)

    def _unary(self, method: str, behavior: Behavior | None, gate: Gate, limit_s: float, *, streams: bool) -> Behavior:
        answer = _asynchronous(behavior, method)

        async def serve(request: Any, context: Any) -> Any:
            call = _Call(self, method, limit_s, streams=streams)
            try:
                async with await call.enter(context):
                    response = await answer(gate(request), context)
            except BaseException as error:
                await call.fail(context, error)
                raise
            call.end("OK")
            return response

        return serve

    def _streaming(self, method: str, behavior: Behavior | None, gate: Gate) -> Behavior:
        limit_s = None if method.rpartition("/")[2] in self.endless else self.settings.stream_deadline_s
        answer = _asynchronous(behavior, method)
        generates = inspect.isasyncgenfunction(answer)

        async def serve(request: Any, context: Any) -> None:
            call = _Call(self, method, limit_s, streams=True)
            if limit_s is None:
                context = _WholeWrites(context, self.endless_calls)
            try:
                async with await call.enter(context):
                    admitted = gate(request)
                    if not generates:
                        await answer(admitted, context)
                    else:
                        async with aclosing(answer(admitted, context)) as responses:
                            async for response in responses:
                                await context.write(response)
            except BaseException as error:
                await call.fail(context, error)
                raise
            call.end("OK")

        return serve


class _Call:
    """One call on its way through the guard."""

    __slots__ = (
        "_began_s",
        "_counted",
        "_counted_caller",
        "_endless",
        "_guard",
        "_limit_s",
        "_method",
        "_span",
        "_streams",
        "_task",
        "_timeout",
    )

    def __init__(self, guard: Guard, method: str, limit_s: float | None, *, streams: bool) -> None:
        self._guard = guard
        self._streams = streams
        self._counted = False
        self._counted_caller = ""
        self._method = method
        self._limit_s = limit_s
        self._endless = limit_s is None
        self._began_s = time.monotonic()
        self._span: Span | None = None
        self._task: asyncio.Task[Any] | None = None
        self._timeout: asyncio.Timeout | None = None

    async def enter(self, context: Any) -> AbstractAsyncContextManager[object]:
        """Establishes trace, deadline and caller, or raises a typed refusal before any work is done."""
        guard = self._guard
        metadata = dict(context.invocation_metadata())
        self._begin_trace(metadata.get(telemetry.TRACEPARENT_KEY))
        self._count()
        scope = self._begin_deadline(context)
        if guard.public:
            caller = Caller(service="")
            if guard.authenticate is not None:
                caller = await guard.authenticate(metadata, self._method)
        else:
            caller = self._peer(context, metadata)
        identity.set_caller(caller)
        self._count_caller(caller)
        if self._endless:
            self._join_endless()
        return scope

    def end(self, code: str, error_type: str | None = None) -> None:
        if self._task is not None:
            self._guard.endless_calls.tasks.discard(self._task)
        self._uncount()
        if self._span is not None:
            telemetry.end_span(self._span, error_type)
            telemetry.record_call(self._method, code, time.monotonic() - self._began_s)

    async def fail(self, context: Any, error: BaseException) -> None:
        """Sends `error` as a typed status by aborting; returns when there is nobody left to tell."""
        if isinstance(error, asyncio.CancelledError) and self._task is not None and self._guard.endless_calls.draining:
            self._task.uncancel()
            error = Unavailable("DEPENDENCY_UNAVAILABLE", "this server is stopping; connect again", retry_after_s=0.5)
        if isinstance(error, _ENDED) or not isinstance(error, Exception):
            self.end("CANCELLED")
            return
        if isinstance(error, TimeoutError) and self._timeout is not None and self._timeout.expired():
            error = DeadlineExceeded("DEADLINE_TOO_SHORT", "the call did not finish within its deadline")
        typed = domain_error_of(error, telemetry.current_trace_id())
        if typed.code in _TOLD_IN_LOG:
            log.error("call_failed", method=self._method, reason=typed.reason, exc_info=error)
        else:
            log.debug("call_refused", method=self._method, reason=typed.reason, message=typed.message)
        self.end(typed.code.name, typed.reason)
        await abort_with(context, typed)

    def _begin_trace(self, traceparent: str | None) -> None:
        telemetry.carry(traceparent)
        if self._guard.settings.otlp_endpoint is not None:
            self._span = telemetry.begin_span(self._method, SpanKind.SERVER, telemetry.current_traceparent())
            telemetry.attach_for_task(self._span)

    def _count(self) -> None:
        """Before anything is done for the call, such as finding out who calls."""
        if self._streams:
            self._guard.limits.take_stream()
        else:
            self._guard.limits.take_call()
        self._counted = True

    def _count_caller(self, caller: Caller) -> None:
        """The streams of a user. Peers that speak for themselves are few, and share what the server has."""
        if self._streams and caller.subject:
            self._guard.limits.take_stream_of(caller.subject)
            self._counted_caller = caller.subject

    def _uncount(self) -> None:
        limits = self._guard.limits
        if not self._counted:
            return
        self._counted = False
        if self._counted_caller:
            limits.give_stream_of(self._counted_caller)
        if self._streams:
            limits.give_stream()
        else:
            limits.give_call()

    def _begin_deadline(self, context: Any) -> AbstractAsyncContextManager[object]:
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            if remaining_s < self._guard.settings.deadline_min_s:
                raise DeadlineExceeded(
                    "DEADLINE_TOO_SHORT", "too little of the deadline is left to begin; allow the call more time"
                )
            # gRPC itself ends the call when a deadline that came with it has passed.
            deadline.set_remaining(remaining_s)
            return _NO_SCOPE
        deadline.set_remaining(self._limit_s)
        if self._limit_s is None:
            return _NO_SCOPE
        self._timeout = asyncio.timeout(self._limit_s)
        return self._timeout

    def _peer(self, context: Any, metadata: Metadata) -> Caller:
        guard = self._guard
        # The subject alternative names; the first one is the service's name, as chassis.pki writes it.
        names = [name.decode() for name in context.peer_identities() or ()]
        if not names:
            raise Unauthenticated("CALLER_NOT_ALLOWED", "this server takes calls with a certificate of the mesh only")
        service = names[0]
        if guard.allow is not None and service not in guard.allow:
            raise PermissionDenied(
                "CALLER_NOT_ALLOWED", f"{service} may not call {self._method}", metadata={"caller": service}
            )
        if service in guard.trusted_forwarders:
            return identity.caller_from(service, metadata)
        return Caller(service=service, instance=pki.instance_of(service, names))

    def _join_endless(self) -> None:
        if self._guard.endless_calls.draining:
            raise Unavailable("DEPENDENCY_UNAVAILABLE", "this server is stopping; connect again", retry_after_s=0.5)
        self._task = asyncio.current_task()
        if self._task is not None:
            self._guard.endless_calls.tasks.add(self._task)


_NO_SCOPE: AbstractAsyncContextManager[object] = nullcontext()


def _gated(read: Read, content: bytes) -> Any:
    """The message of a call that entered; what came is bytes, whatever the handler takes."""
    return admit(read, content, from_user=identity.current_caller().is_user)


def _gated_stream(read: Read, contents: Any) -> Any:
    return admit_each(read, contents, from_user=identity.current_caller().is_user)


async def abort_with(context: Any, error: DomainError) -> None:
    """Ends the call with the status of `error` and its details; raises gRPC's AbortError."""
    status = errors.pack(error)
    details = ((errors.DETAILS_KEY, status.SerializeToString()),)
    await context.abort(error.code, status.message, details)


def _asynchronous(behavior: Behavior | None, method: str) -> Behavior:
    if inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior):
        return cast(Behavior, behavior)
    if not getattr(behavior, "__module__", "").endswith("_pb2_grpc"):
        raise TypeError(f"{method} must be served by an async function")

    # The generated base class's own method: the implementation does not have this one.
    async def refuse(request: Any, context: Any) -> Any:
        raise Unimplemented("NOT_OFFERED", f"this deployment does not offer {method}")

    return refuse
