"""All spans of a service that runs in this process, and what must be true of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_trace_id

from cluster.tracing.span_writer import SpanWriter, loops_start_ns
from engine.request import Receipt

NS = 1e-9
# A whole number of nanoseconds is what a span has.
ROUNDING_S = 1e-6


class Collector:
    """Takes what each process writes, by OpenTelemetry's SDK and its in-memory exporter."""

    def __init__(self, zero_ns: Callable[[], int] = loops_start_ns) -> None:
        self._exporter = InMemorySpanExporter()
        self._zero_ns = zero_ns

    def sink_of(self, process: str) -> SpanWriter:
        return SpanWriter(SimpleSpanProcessor(self._exporter), self._exporter, process, self._zero_ns)

    def traces(self) -> list[Trace]:
        """In order of their requests' ends."""
        spans: dict[int, list[ReadableSpan]] = defaultdict(list)
        for span in self._exporter.get_finished_spans():
            spans[span.context.trace_id].append(span)
        return [Trace(tuple(each)) for each in spans.values()]

    def trace_of(self, request_id: str) -> Trace:
        [found] = [trace for trace in self.traces() if trace.request_id == request_id]
        return found


@dataclass(frozen=True)
class Trace:
    """The spans of one trace."""

    spans: tuple[ReadableSpan, ...]

    @property
    def request(self) -> ReadableSpan:
        [request] = self.named("chat m", "text_completion m", "text_completion emulated", "text_completion tiny")
        return request

    @property
    def request_id(self) -> str:
        return str(self.request.attributes["gen_ai.response.id"])

    @property
    def trace_id(self) -> str:
        return format_trace_id(self.request.context.trace_id)

    def named(self, *names: str) -> list[ReadableSpan]:
        """In order of their beginnings."""
        return sorted((span for span in self.spans if span.name in names), key=lambda span: span.start_time)

    def one(self, name: str) -> ReadableSpan:
        [span] = self.named(name)
        return span

    def processes(self) -> set[str]:
        return {str(span.resource.attributes["service.instance.id"]) for span in self.spans}

    def check_tree(self, outer_id: int = 0, slack_s: float = 0.0) -> None:
        """One tree below the request, which is below `outer_id`; nothing begins before what is above it, nor ends after
        it."""
        by_id = {span.context.span_id: span for span in self.spans}
        assert len(by_id) == len(self.spans), "two spans have the same id"
        for span in self.spans:
            if span is self.request:
                assert (span.parent.span_id if span.parent else 0) == outer_id
                continue
            above = by_id.get(span.parent.span_id)
            assert above is not None, f"{span.name} is below nothing"
            slack_ns = round(slack_s / NS)
            assert above.start_time - slack_ns <= span.start_time, f"{span.name} begins before {above.name}"
            assert span.end_time <= above.end_time + slack_ns, f"{span.name} ends after {above.name}"

    def check_receipt(self, receipt: Receipt) -> None:
        """Its phases are those of the receipt, to within 5 %."""
        routes, attempts = self.named("route"), self.named("attempt")
        expected = {
            "prefill queue": receipt.prefill_queue_s,
            "prefill": receipt.prefill_s,
            "kv exposed": receipt.kv_exposed_s,
            "decode queue": receipt.decode_queue_s,
            "decode": receipt.decode_s,
        }
        last = self.below(attempts[-1])
        for name, phase_s in expected.items():
            taken_s = seconds([span for span in last if span.name == name])
            assert taken_s == pytest.approx(phase_s, rel=0.05, abs=ROUNDING_S), name
        before_s = seconds([*self.named("gateway queue"), *routes, *attempts[:-1]])
        assert before_s == pytest.approx(receipt.gateway_queue_s + receipt.retry_s, rel=0.05, abs=ROUNDING_S)

    def below(self, span: ReadableSpan) -> list[ReadableSpan]:
        """All that is below a span, at any depth."""
        found: list[ReadableSpan] = []
        todo = [span]
        while todo:
            above = todo.pop().context.span_id
            children = [each for each in self.spans if each.parent is not None and each.parent.span_id == above]
            found += children
            todo += children
        return found


def seconds(spans: Sequence[ReadableSpan]) -> float:
    """Of all of them together."""
    return sum(span.end_time - span.start_time for span in spans) * NS
