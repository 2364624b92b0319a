"""The exporters of traces and metrics over OTLP, and the instrumentation of the database driver.

Imported only by a process that exports: the exporters cost a third of a second at every start.
"""

from collections.abc import Callable

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def start_export(service_name: str, endpoint: str) -> Callable[[], None]:
    """Begins to export; the returned function flushes and stops, and may block for a few seconds."""
    insecure = not endpoint.startswith("https://")
    resource = Resource.create({"service.name": service_name, "service.namespace": "finemesh"})
    traces = TracerProvider(resource=resource)
    traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, insecure=insecure)))
    trace.set_tracer_provider(traces)
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=endpoint, insecure=insecure))
    meters = MeterProvider(resource=resource, metric_readers=[reader])
    metrics.set_meter_provider(meters)
    AsyncPGInstrumentor().instrument()

    def stop() -> None:
        traces.shutdown()
        meters.shutdown(timeout_millis=3000)

    return stop
