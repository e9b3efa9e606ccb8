"""A prefill worker's spans of one prompt.

    prefill worker        arrival ─────────────────────────────────────────────────▶ all KV has left
      prefill queue       arrival ─▶ its first chunk starts
      prefill                        its first chunk starts ─▶ its first token is drawn

Implements prefill_worker.observer.Observer.
"""

from __future__ import annotations

from cluster.tracing.decode_spans import PREFILL, PREFILL_QUEUE
from cluster.tracing.span import Phases, Sink, Span, Value, how_failed
from engine.errors import TandemError
from engine.trace_context import TraceContext
from prefill_worker.job import Job, JobState

SERVE = "prefill worker"


class PrefillSpans:
    """Of all prompts whose streams end on one worker."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def ended(self, job: Job, now: float, error: TandemError | None) -> None:
        trace = job.call.trace
        if trace is not None and trace.is_sampled:
            # Parts that came damaged are asked for by further calls, below the same span.
            self._sink.write(_spans(job, trace.child(SERVE, job.call.lease), now, error))


def _spans(job: Job, trace: TraceContext, now: float, error: TandemError | None) -> list[Span]:
    attributes: dict[str, Value] = {
        "tandem.request_id": job.call.request_id.rpartition("#")[0] or job.call.request_id,
        "tandem.prompt_tokens": job.prompt_tokens,
        "tandem.cached_tokens": job.cached,
    }
    error_type, problem = how_failed(error)
    end_s = now if job.sent_s is None else job.sent_s
    phases = Phases(trace, end_s)
    started_s = None if job.state is JobState.WAITING else job.started_s
    phases.add(PREFILL_QUEUE, job.arrived_s, started_s)
    phases.add(PREFILL, started_s, job.finished_s)
    own = Span(SERVE, trace, job.arrived_s, end_s, "server", attributes, error_type, problem)
    return [own, *phases.spans]
