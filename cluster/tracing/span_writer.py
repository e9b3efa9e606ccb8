"""Spans on their way to a collector, by OpenTelemetry's SDK, which is loaded only where requests are traced.

spans of a request that has ended ─▶ queue, bounded ─▶ thread ─ OTLP over gRPC ─▶ collector
                                       └─ full: the oldest are dropped, and nobody waits
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from cluster.tracing.span import Kind, Span

SERVICE = "tandem"
# How long the end of a process waits for a collector that does not take what is left.
FLUSH_S = 3.0
_NS = 1_000_000_000
_KINDS: dict[Kind, SpanKind] = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
}

_log = logging.getLogger(__name__)


def loops_start_ns() -> int:
    """The wall clock's time when the clock of event loops was at 0: both run by the machine's monotonic clock."""
    return time.time_ns() - time.monotonic_ns()


class SpanWriter:
    """Implements cluster.tracing.span.Sink. `process` names this process among all of the service. `zero_ns`: what the
    wall clock shows when the running loop's is at 0, asked for once per request: the wall clock may be set."""

    def __init__(
        self,
        processor: SpanProcessor,
        exporter: SpanExporter,
        process: str,
        zero_ns: Callable[[], int] = loops_start_ns,
    ) -> None:
        self._exporter = exporter
        self._zero_ns = zero_ns
        self._ids = _GivenIds()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=_resource(process), shutdown_on_exit=False, id_generator=self._ids
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("tandem")

    def write(self, spans: list[Span]) -> None:
        """Each must be sampled. Never waits."""
        zero_ns = self._zero_ns()
        for span in spans:
            self._write(span, zero_ns)

    async def close(self) -> None:
        """Sends what is left, for FLUSH_S at most. The running loop turns meanwhile."""
        loop, has_ended = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            # It may have taken so long that nobody waits any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(has_ended.set)

        threading.Thread(target=shut_down, name="last spans", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_S):
                await has_ended.wait()
        except TimeoutError:
            _log.warning("the collector did not take the last spans within %g s", FLUSH_S)
            self._exporter.shutdown()

    def _write(self, span: Span, zero_ns: int) -> None:
        trace = span.trace
        state = TraceState.from_header([trace.state]) if trace.state else None
        above = Context()
        self._ids.trace_id, self._ids.span_id = trace.trace_id, trace.span_id
        if trace.parent_id:
            # The SDK makes of it what is above, and whether it is another process's.
            parent = SpanContext(
                trace.trace_id, trace.parent_id, span.kind == "server", TraceFlags(TraceFlags.SAMPLED), state
            )
            above = set_span_in_context(NonRecordingSpan(parent), above)
        written = self._tracer.start_span(
            span.name, above, _KINDS[span.kind], span.attributes, start_time=zero_ns + round(span.start_s * _NS)
        )
        if span.error_type:
            written.set_attribute("error.type", span.error_type)
            written.set_status(Status(StatusCode.ERROR, span.problem or None))
        written.end(zero_ns + round(span.end_s * _NS))


class _GivenIds(IdGenerator):
    """Gives the ids that others have handed on already."""

    def __init__(self) -> None:
        self.trace_id, self.span_id = 1, 1

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


def _resource(process: str) -> Resource:
    """What OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say counts before what is said here."""
    given = Resource.create()
    name = str(given.attributes.get("service.name", ""))
    own = {"service.instance.id": process, **({"service.name": SERVICE} if name.startswith("unknown_service") else {})}
    return given.merge(Resource(own))
