"""What stands around every served call: who calls, until when, under which trace, and how its failure is told.

Who calls is asked when the headers are here, before a place is taken and before the request is waited for. One wrapper
per method, made when the method is registered, instead of a stack of interceptors that grpc.aio would walk
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
from chassis.errors import (
    DeadlineExceeded,
    DomainError,
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from chassis.identity import Caller
from chassis.rpc import deadline
from chassis.rpc.call_limits import CallLimits, Place
from chassis.rpc.open_calls import OpenCalls
from chassis.rpc.request_gate import Read, admit, admit_each
from chassis.rpc.untyped_errors import domain_error_of
from chassis.rpc.watched_writes import WatchedWrites
from chassis.rpc.witness import OK, Witness, Witnessing, witnessed
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
    ends: set[Callable[[DomainError], None]] = field(default_factory=set)

    def end(self) -> None:
        self.draining = True
        for end in self.ends:
            end(_stopping())


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
    # Sees the calls that got a place, and may refuse them.
    witnessing: Witnessing | None = None
    # For calls of anybody, such as health: they take the places of these instead of those in `limits`.
    open_calls: OpenCalls | None = None
    # Methods, by their short names, that a drain ends at once, and their default deadline; None: they have none.
    endless: frozenset[str] = frozenset()
    endless_s_max: float | None = None
    endless_calls: EndlessCalls = field(default_factory=EndlessCalls)

    def wrap(self, method: str, handler: Handler) -> Handler:
        """`method` is the full name, `/package.Service/Method`.

        To gRPC every call takes a stream of requests. It would wait for the one request of the others by itself: before
        anybody is asked who calls, and for as long as the caller likes.
        """
        # Without a deserializer: gRPC hands over bytes, and the gate reads them.
        coders = {"response_serializer": handler.response_serializer}
        single = not handler.request_streaming
        gate = partial(_gated if single else _gated_stream, handler.request_deserializer)
        if handler.response_streaming:
            behavior = handler.unary_stream if single else handler.stream_stream
            answering = self._streaming(method, behavior, gate, single=single)
            return grpc.stream_stream_rpc_method_handler(answering, **coders)
        behavior = handler.unary_unary if single else handler.stream_unary
        answering = self._unary(method, behavior, gate, single=single)
        return grpc.stream_unary_rpc_method_handler(answering, **coders)

    def _unary(self, method: str, behavior: Behavior | None, gate: Gate, *, single: bool) -> Behavior:
        limit_s = self.settings.default_deadline_s if single else self.settings.stream_deadline_s
        answer = _asynchronous(behavior, method)
        witness_of = self._witness_of(method)

        async def serve(requests: Any, context: Any) -> Any:
            call = _Call(self, method, limit_s, streams=not single, witness=witness_of())
            try:
                async with await call.enter(context):
                    request = await call.request(context) if single else call.requests(requests)
                    response = await answer(gate(request), context)
                    await call.answered(response)
            except BaseException as error:
                await call.fail(context, error)
                raise
            call.end(OK)
            return response

        return serve

    def _streaming(self, method: str, behavior: Behavior | None, gate: Gate, *, single: bool) -> Behavior:
        endless = method.rpartition("/")[2] in self.endless
        limit_s = self.endless_s_max if endless else self.settings.stream_deadline_s
        answer = _asynchronous(behavior, method)
        generates = inspect.isasyncgenfunction(answer)
        witness_of = self._witness_of(method)

        async def serve(requests: Any, context: Any) -> None:
            call = _Call(self, method, limit_s, streams=True, endless=endless, witness=witness_of())
            answers = WatchedWrites(context, self.settings.stalled_reader_s_max, call.tell)
            try:
                async with await call.enter(context):
                    request = gate(await call.request(context) if single else call.requests(requests))
                    if not generates:
                        await answer(request, answers)
                    else:
                        async with aclosing(answer(request, answers)) as responses:
                            async for response in responses:
                                await answers.write(response)
                    await call.answered()
            except BaseException as error:
                await call.fail(context, error, answers)
                raise
            finally:
                answers.close()
            call.end(OK)

        return serve

    def _witness_of(self, method: str) -> Callable[[], Witness | None]:
        witness_of = None if self.witnessing is None else self.witnessing(method)
        return witness_of or _nobody


class _Call:
    """One call on its way through the guard."""

    __slots__ = (
        "_began_s",
        "_endless",
        "_guard",
        "_limit_s",
        "_method",
        "_place",
        "_span",
        "_streams",
        "_task",
        "_timeout",
        "_told",
        "_witness",
    )

    def __init__(
        self,
        guard: Guard,
        method: str,
        limit_s: float | None,
        *,
        streams: bool,
        endless: bool = False,
        witness: Witness | None = None,
    ) -> None:
        self._guard = guard
        self._streams = streams
        self._endless = endless
        self._method = method
        self._limit_s = limit_s
        self._began_s = time.monotonic()
        self._span: Span | None = None
        self._place: Place | None = None
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self._told: DomainError | None = None
        self._timeout: asyncio.Timeout | None = None
        self._witness = witness

    async def enter(self, context: Any) -> AbstractAsyncContextManager[object]:
        """Establishes trace, deadline, caller and place, or raises a typed refusal before any work is done."""
        guard = self._guard
        metadata = dict(context.invocation_metadata())
        self._begin_trace(metadata.get(telemetry.TRACEPARENT_KEY))
        scope = self._begin_deadline(context)
        if guard.public:
            caller = Caller(service="")
            if guard.authenticate is not None:
                caller = await guard.authenticate(metadata, self._method)
        else:
            caller = self._peer(context, metadata)
        identity.set_caller(caller)
        self._take_place(caller, context)
        if self._endless:
            if guard.endless_calls.draining:
                raise _stopping()
            guard.endless_calls.ends.add(self.tell)
        return scope

    async def request(self, context: Any) -> Any:
        """The one request of a call that takes no stream of them."""
        limit_s = self._guard.settings.request_s_max
        try:
            async with asyncio.timeout(limit_s):
                request = await context.read()
        except TimeoutError as error:
            raise DeadlineExceeded(
                "DEADLINE_TOO_SHORT", f"the request of this call did not arrive within {limit_s:g} s (request_s_max)"
            ) from error
        if request is grpc.aio.EOF:
            raise InvalidArgument("INVALID_FIELD", "this call ended without its request; send one message")
        if self._witness is not None:
            await self._witness.asked(request)
        return request

    def requests(self, contents: Any) -> Any:
        """The requests of a call that takes a stream of them."""
        return contents if self._witness is None else witnessed(self._witness, contents)

    async def answered(self, response: Any = None) -> None:
        """What was asked for is done; the answer is still on its way."""
        await self._came_to(OK, response)

    def tell(self, error: DomainError) -> None:
        """Ends the call from outside, with this status."""
        if self._task is not None and self._told is None:
            self._told = error
            self._task.cancel()

    def end(self, code: str, error_type: str | None = None) -> None:
        # From here on nobody may cancel what sends the status.
        self._task = None
        if self._endless:
            self._guard.endless_calls.ends.discard(self.tell)
        if self._place is not None:
            self._place.leave()
        if self._span is not None:
            telemetry.end_span(self._span, error_type)
            telemetry.record_call(self._method, code, time.monotonic() - self._began_s)

    async def fail(self, context: Any, error: BaseException, answers: WatchedWrites | None = None) -> None:
        """Sends `error` as a typed status by aborting; returns when there is nobody left to tell."""
        if isinstance(error, asyncio.CancelledError) and self._told is not None and self._task is not None:
            self._task.uncancel()
            error = self._told
        if isinstance(error, _ENDED) or not isinstance(error, Exception):
            self.end("CANCELLED")
            await self._came_to("CANCELLED")
            return
        if isinstance(error, TimeoutError) and self._timeout is not None and self._timeout.expired():
            error = DeadlineExceeded("DEADLINE_TOO_SHORT", "the call did not finish within its deadline")
        typed = domain_error_of(error, telemetry.current_trace_id())
        if typed.code in _TOLD_IN_LOG:
            log.error("call_failed", method=self._method, reason=typed.reason, exc_info=error)
        else:
            log.debug("call_refused", method=self._method, reason=typed.reason, message=typed.message)
        self.end(typed.code.name, typed.reason)
        await self._came_to(typed.reason)
        if answers is not None:
            await answers.head_sent()
        await abort_with(context, typed)

    async def _came_to(self, outcome: str, response: Any = None) -> None:
        if self._witness is not None:
            await self._witness.ended(outcome, response)

    def _begin_trace(self, traceparent: str | None) -> None:
        telemetry.carry(traceparent)
        if self._guard.settings.otlp_endpoint is not None:
            self._span = telemetry.begin_span(self._method, SpanKind.SERVER, telemetry.current_traceparent())
            telemetry.attach_for_task(self._span)

    def _take_place(self, caller: Caller, context: Any) -> None:
        open_calls = self._guard.open_calls
        if open_calls is not None:
            place = open_calls.enter(context.peer(), self.tell)
        else:
            place = self._guard.limits.take(caller.subject, streams=self._streams)
        self._place = place
        # The caller's part of the places is given back when gRPC is done with the call: an answer that its caller does
        # not take lies in memory until then.
        context.add_done_callback(place.forget)

    def _begin_deadline(self, context: Any) -> AbstractAsyncContextManager[object]:
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            if remaining_s < self._guard.settings.deadline_min_s:
                raise DeadlineExceeded(
                    "DEADLINE_TOO_SHORT", "too little of the deadline is left to begin; allow the call more time"
                )
            if self._guard.open_calls is None or self._limit_s is None or remaining_s <= self._limit_s:
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


_NO_SCOPE: AbstractAsyncContextManager[object] = nullcontext()


def _gated(read: Read, content: bytes) -> Any:
    """The message of a call that entered; what came is bytes, whatever the handler takes."""
    return admit(read, content, from_user=identity.current_caller().is_user)


def _gated_stream(read: Read, contents: Any) -> Any:
    return admit_each(read, contents, from_user=identity.current_caller().is_user)


def _nobody() -> None:
    """The witness of a method that nobody looks at."""


def _stopping() -> Unavailable:
    return Unavailable("DEPENDENCY_UNAVAILABLE", "this server is stopping; connect again", retry_after_s=0.5)


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
