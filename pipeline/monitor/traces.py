"""OpenTelemetry traces, enabled by `run.traces`: a span for the run and a child span for each request. Spans never contain
a prompt or an answer.

Attribute names follow OpenTelemetry's conventions for generative AI, or begin with `eagleray.` if these have no name.
Headers, client certificates and so on come from OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_HEADERS, …).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from engines.config import EngineConfig
from engines.errors import ConfigError, ErrorCode
from engines.tasks import task_of
from engines.types import Completion
from pipeline.monitor.console import warn

if TYPE_CHECKING:
    from rich.console import Console

# Up to this many spans wait for the exporter. Further spans are dropped, because rows must not wait for their spans.
WAITING_SPANS = 1 << 16
# Seconds that the end of a run waits for the collector to accept its span.
LAST_S = 5.0
# Seconds that a worker waits at its end for the collector to accept its spans.
WORKER_LAST_S = 10.0


@dataclass(frozen=True, slots=True)
class Trace:
    """The data that a worker needs to make its spans children of the run's span."""

    endpoint: str
    parent: str  # the run's span in the form of W3C's `traceparent`


def variables() -> set[str]:
    """The names of OpenTelemetry's variables in the environment. Workers on other nodes need them too."""
    return {name for name in os.environ if name.startswith("OTEL_")}


def _exporter(endpoint: str, **more: Any) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        text = "run.traces needs OpenTelemetry: run pip install 'eagleray[traces]'"
        raise ConfigError(text, code=ErrorCode.PACKAGE_MISSING, key="run.traces") from None
    # Silence its long repeated messages: `run_span` prints one warning at the end.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    path = "" if urlsplit(endpoint).path.strip("/") else "/v1/traces"
    return OTLPSpanExporter(endpoint=endpoint.rstrip("/") + path, **more)


def _provider(instance: str) -> Any:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    name = os.environ.get("OTEL_SERVICE_NAME", "eagleray")
    return TracerProvider(resource=Resource.create({"service.name": name, "service.instance.id": instance}))


@contextlib.contextmanager
def run_span(endpoint: str | None, engine: EngineConfig, console: Console) -> Iterator[RunSpan | None]:
    """The span of a run, in the driver; None if traces are off. Prints a warning if the collector does not accept it."""
    if endpoint is None:
        yield None
        return
    span = RunSpan(endpoint, engine)
    try:
        yield span
    except BaseException as error:
        span.failed(type(error).__name__)
        raise
    finally:
        if not span.end():
            warn(console, f"{endpoint} did not accept the traces: run.traces must be the address of OTLP over HTTP.")


class RunSpan:
    """The root span. It is sent alone at the end of the run, without a thread."""

    def __init__(self, endpoint: str, engine: EngineConfig) -> None:
        self.exporter = _exporter(endpoint, timeout=LAST_S)
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.span = _provider("driver").get_tracer("eagleray").start_span("eagleray run", attributes=_engine(engine))
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self.span))
        self.trace = Trace(endpoint, carrier.get("traceparent", ""))

    def rows(self, rows: Mapping[str, int]) -> None:
        """Sets the row counts of the manifest as attributes."""
        self.span.set_attributes({f"eagleray.rows.{name}": count for name, count in rows.items()})

    def failed(self, kind: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self.span.set_attribute("error.type", kind)
        self.span.set_status(Status(StatusCode.ERROR))

    def end(self) -> bool:
        """Ends and sends the span. True if the collector accepted it, or if sampling left it out."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        if not self.span.is_recording():  # OTEL_TRACES_SAMPLER excluded it
            return True
        self.span.end()
        taken = self.exporter.export([self.span]) is SpanExportResult.SUCCESS
        self.exporter.shutdown()
        return taken


# The names of operations in OpenTelemetry's conventions that are not ours.
_OPERATIONS = {"embed": "embeddings"}


class RequestSpans:
    """The spans of one worker. A thread of the exporter sends them in batches."""

    def __init__(self, trace: Trace, engine: EngineConfig, worker: str) -> None:
        exporter = _exporter(trace.endpoint)
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = _provider(worker)
        self.provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=WAITING_SPANS))
        self.tracer = self.provider.get_tracer("eagleray")
        self.parent = TraceContextTextMapPropagator().extract({"traceparent": trace.parent})
        self.engine, self.kind = _engine(engine), engine.kind
        self.model = engine.model

    def add(self, key: bytes, id: str, began_ns: int, completion: Completion) -> None:
        """Adds a span for a request that ended now. The span covers all its tries."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        task = task_of(completion.values)
        operation = _OPERATIONS.get(task, task)
        attributes: dict[str, Any] = {
            **self.engine,
            "gen_ai.operation.name": operation,
            "eagleray.engine": completion.engine or self.kind,
            "eagleray.key": key.hex(),
            "eagleray.id": id,
            "eagleray.attempts": completion.attempts,
        }
        if completion.model:
            attributes["gen_ai.response.model"] = completion.model
        if completion.error is None:
            attributes["gen_ai.response.finish_reasons"] = [choice.finish_reason for choice in completion.choices]
            attributes["gen_ai.usage.input_tokens"] = completion.usage.input
            attributes["gen_ai.usage.cache_read.input_tokens"] = completion.usage.cached_input
            attributes["gen_ai.usage.output_tokens"] = completion.usage.output
            if completion.usage.cache_write:
                attributes["gen_ai.usage.cache_creation.input_tokens"] = completion.usage.cache_write
            if completion.usage.reasoning:
                attributes["gen_ai.usage.reasoning.output_tokens"] = completion.usage.reasoning
            if completion.cost_usd:
                attributes["eagleray.cost_usd"] = completion.cost_usd
        else:  # without the error's message, which may quote the row
            attributes["error.type"] = completion.error.type
            if completion.error.status is not None:
                attributes["http.response.status_code"] = completion.error.status
        name = f"{operation} {self.model}" if self.model else operation
        span = self.tracer.start_span(name, self.parent, kind=SpanKind.CLIENT, attributes=attributes, start_time=began_ns)
        if completion.error is not None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(time.time_ns())

    async def close(self) -> None:
        """Sends the waiting spans. Spans that the collector has not accepted after `WORKER_LAST_S` are lost."""
        sending = asyncio.ensure_future(asyncio.to_thread(self.provider.shutdown))
        await asyncio.wait([sending], timeout=WORKER_LAST_S)


def _engine(engine: EngineConfig) -> dict[str, Any]:
    attributes = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": engine.kind, "eagleray.engine": engine.kind}
    return attributes | ({"gen_ai.request.model": engine.model} if engine.model else {})
