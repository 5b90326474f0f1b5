"""OpenTelemetry traces, when switched on; nothing and free of cost when not.

Trace context travels as W3C `traceparent` metadata. The exporter is configured by OpenTelemetry's own environment variables
(`OTEL_EXPORTER_OTLP_ENDPOINT` and others).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_tracer: Tracer | None = None


def configure(service: str, *, enabled: bool) -> None:
    """Switch traces on for this process; raises RuntimeError that says what to install when the packages are missing."""
    global _tracer
    if not enabled:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        raise RuntimeError("traces are switched on, but their packages are not installed: pip install 'sealpush[otel]'") from e
    provider = TracerProvider(resource=Resource.create({"service.name": f"sealpush-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    _tracer = trace.get_tracer("sealpush")


def enabled() -> bool:
    return _tracer is not None


@contextmanager
def server_span(method: str, metadata: Mapping[str, str]) -> Iterator[None]:
    """A span for a call being served, child of the caller's."""
    if _tracer is None:
        yield
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    with _tracer.start_as_current_span(method, context=extract(dict(metadata)), kind=SpanKind.SERVER):
        yield


def outgoing_metadata() -> dict[str, str]:
    """Metadata that carries the present trace to the next service."""
    carrier: dict[str, str] = {}
    if _tracer is not None:
        from opentelemetry.propagate import inject

        inject(carrier)
    return carrier
