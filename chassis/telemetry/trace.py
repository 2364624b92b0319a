"""The trace of the work at hand: carried from hop to hop always, recorded as OpenTelemetry spans only when exported.

The gRPC spans are made by hand in `chassis.rpc.server` and `chassis.rpc.channel`, not by the instrumentation package:
its aio interceptors cost a task per client call and a stack of wrappers per server call, which `bench-edge` cannot
afford, and they make no trace ids where nothing is exported, so that logs of two services could not be joined.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags

# The W3C header, in gRPC metadata and in the headers of bus messages alike.
TRACEPARENT_KEY = "traceparent"

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_carried: ContextVar[str] = ContextVar("finemesh_traceparent", default="")
_tracer = trace.get_tracer("chassis")
_duration_s = metrics.get_meter("chassis").create_histogram("rpc.server.duration", unit="s")
# Ids of traces are no secrets, and a generator of its own leaves seeded randomness elsewhere alone.
_random = random.Random()  # noqa: S311


def current_traceparent() -> str:
    """The W3C header value for the next hop; empty outside of any trace."""
    context = trace.get_current_span().get_span_context()
    return _format(context) if context.is_valid else _carried.get()


def current_trace_id() -> str:
    """32 hex digits, for logs and for people; empty outside of any trace."""
    return current_traceparent()[3:35]


def carry(traceparent: str | None) -> None:
    """Goes on with the caller's trace, or begins one; for a task that serves one call."""
    _carried.set(_valid(traceparent) or new_traceparent())


def new_traceparent() -> str:
    return f"00-{_random.getrandbits(128) | 1:032x}-{_random.getrandbits(64) | 1:016x}-01"


@contextmanager
def span(name: str, traceparent: str | None = None, *, kind: SpanKind = SpanKind.INTERNAL) -> Iterator[None]:
    """A piece of work that no call surrounds, such as one event handled; an error marks the span."""
    carried = _carried.set(_valid(traceparent) or current_traceparent() or new_traceparent())
    started = begin_span(name, kind, _carried.get())
    attached = otel_context.attach(trace.set_span_in_context(started)) if started.is_recording() else None
    try:
        yield
    except Exception as error:
        end_span(started, type(error).__name__)
        raise
    else:
        end_span(started)
    finally:
        if attached is not None:
            otel_context.detach(attached)
        _carried.reset(carried)


def begin_span(name: str, kind: SpanKind, parent_traceparent: str) -> Span:
    """A child of the given valid parent; it becomes nobody's current span by this."""
    parent = trace.set_span_in_context(NonRecordingSpan(_parse(parent_traceparent)))
    return _tracer.start_span(name, context=parent, kind=kind)


def attach_for_task(started: Span) -> None:
    """Makes `started` the current span until the running task ends; the server runs each call in its own task."""
    otel_context.attach(trace.set_span_in_context(started))


def end_span(started: Span, error_type: str | None = None) -> None:
    if error_type is not None:
        started.set_status(StatusCode.ERROR, error_type)
        started.set_attribute("error.type", error_type)
    started.end()


def traceparent_of(started: Span) -> str:
    return _format(started.get_span_context())


def record_call(method: str, code: str, seconds: float) -> None:
    _duration_s.record(seconds, {"rpc.method": method, "rpc.grpc.status_code": code})


def _valid(traceparent: str | None) -> str | None:
    return traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None


def _format(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _parse(traceparent: str) -> SpanContext:
    _, trace_id, span_id, flags = traceparent.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
