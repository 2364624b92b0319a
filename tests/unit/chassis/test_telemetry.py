"""Spans and logs: one trace from client to server where spans are recorded, and its id in every line of the log."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from google.protobuf.wrappers_pb2 import StringValue
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from chassis.errors import NotFound
from chassis.rpc.server import ServerBuilder
from chassis.telemetry import logs
from chassis.telemetry import trace as telemetry
from tests.harness.living import living

from .echo import SERVICE, Echo, add_echo_to_server, settings_of, stub_of


class Work(Echo):
    async def Say(self, request: StringValue, context: object) -> StringValue:
        with telemetry.span("work"):
            if request.value == "fail":
                raise NotFound("NOT_FOUND", "nothing there")
        return request


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    # A provider of this test only: OpenTelemetry's own is global and can be set once in a process.
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    return exporter


@pytest.mark.parametrize(("value", "error_type"), [("fine", None), ("fail", "NOT_FOUND")])
async def test_client_server_and_inner_span_are_one_chain(
    tls_dir: Path, spans: InMemorySpanExporter, value: str, error_type: str | None
) -> None:
    back = settings_of("back", tls_dir, otlp_endpoint="http://unused")
    front = settings_of("front", tls_dir, otlp_endpoint="http://unused")
    traceparent = telemetry.new_traceparent()
    async with living(back) as process:
        server = ServerBuilder(process, back)
        server.add(add_echo_to_server, Work(), SERVICE, {"front"})
        async with stub_of(front, await server.start(), "back") as stub:
            with telemetry.span("test", traceparent), contextlib.suppress(NotFound):
                await stub.Say(StringValue(value=value))
    by_kind = {(span.kind, span.name): span for span in spans.get_finished_spans()}
    names = [
        (SpanKind.INTERNAL, "test"),
        (SpanKind.CLIENT, f"/{SERVICE}/Say"),
        (SpanKind.SERVER, f"/{SERVICE}/Say"),
        (SpanKind.INTERNAL, "work"),
    ]
    chain = [by_kind[name] for name in names]
    assert {f"{span.context.trace_id:032x}" for span in chain} == {traceparent[3:35]}
    assert [child.parent.span_id for child in chain[1:]] == [parent.context.span_id for parent in chain[:-1]]
    assert [span.attributes.get("error.type") for span in chain[1:3]] == [error_type] * 2


@pytest.mark.parametrize("traceparent", [None, "", "garbage", "00-" + "0" * 32 + "-" + "1" * 16 + "-01"])
def test_a_missing_or_broken_trace_is_replaced(traceparent: str | None) -> None:
    with telemetry.span("outer", traceparent):
        assert len(telemetry.current_trace_id().strip("0")) > 8
    assert telemetry.current_trace_id() == ""


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("restored_logging")
def test_both_kinds_of_logs_are_json_with_the_trace_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(settings_of("oven", tmp_path))
    with telemetry.span("test"):
        trace_id = telemetry.current_trace_id()
        structlog.get_logger().info("baked", loaves=3)
        logging.getLogger("library").warning("flour %s", "low")
        structlog.get_logger().debug("not shown")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [("baked", "info"), ("flour low", "warning")]
    assert {(line["trace_id"], line["service"]) for line in lines} == {(trace_id, "oven")}
    assert lines[0]["loaves"] == 3
