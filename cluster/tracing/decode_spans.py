"""A decode worker's spans of one attempt at a request.

    decode worker                  arrival ────────────────────────────────────────────▶ its last token, or its end
      pull queue, pull             arrival ─▶ the KV stream is asked for ─▶ all KV is there
        kv transfer                                            the first KV ─▶ all KV is there
        kv exposed                                       the first token ────▶ all KV is there
      prefill queue, prefill       where it computed the prompt itself
      decode queue, decode                                                      all KV is there ─▶ first step ─▶ end

Implements decode_worker.observer.Observer.
"""

from __future__ import annotations

from cluster.tracing.span import Phases, Sink, Span, Value, how_failed
from decode_worker.pull import PULL, SERVE
from decode_worker.sequence import Request, Timeline
from engine.errors import TandemError
from engine.trace_context import TraceContext

PULL_QUEUE = "pull queue"
KV_TRANSFER = "kv transfer"
KV_EXPOSED = "kv exposed"
PREFILL_QUEUE = "prefill queue"
PREFILL = "prefill"
DECODE_QUEUE = "decode queue"
DECODE = "decode"


class DecodeSpans:
    """Of all requests that end on one worker."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def ended(self, request: Request, now: float, error: TandemError | None) -> None:
        trace = request.submit.trace
        if trace is not None and trace.is_sampled:
            self._sink.write(_spans(request, trace.child(SERVE), now, error))


def _spans(request: Request, trace: TraceContext, now: float, error: TandemError | None) -> list[Span]:
    times = request.times
    phases = Phases(trace, now)
    if times.compute_started_s is not None:
        phases.add(PREFILL_QUEUE, times.arrived_s, times.compute_started_s)
        phases.add(PREFILL, times.compute_started_s, times.first_token_s)
    ready_s = _ready_s(request)
    # What was begun elsewhere may get all its tokens while it is computed again: it decodes without a decode step.
    first_step_s = ready_s if times.first_step_s is None and request.is_finished else times.first_step_s
    phases.add(DECODE_QUEUE, ready_s, first_step_s)
    phases.add(DECODE, first_step_s, times.last_token_s if request.is_finished else None)
    pull = _pull(request, trace, ready_s, now, error)
    return [_own(request, trace, now, error), *pull, *phases.spans]


def _ready_s(request: Request) -> float | None:
    """When decoding could begin, as its receipt says."""
    times = request.times
    if times.first_token_s is None:
        return None
    if times.kv_ready_s is None:
        # Begun elsewhere, it has no prompt to wait for.
        return times.first_token_s if request.submit.resumed else None
    return max(times.kv_ready_s, times.first_token_s)


def _own(request: Request, trace: TraceContext, now: float, error: TandemError | None) -> Span:
    attributes: dict[str, Value] = {
        "tandem.request_id": request.submit.own_id,
        "tandem.cached_tokens": request.cached_tokens,
        "tandem.preemptions": request.preemptions,
    }
    error_type, problem = how_failed(error)
    return Span(SERVE, trace, request.times.arrived_s, now, "server", attributes, error_type, problem)


def _pull(
    request: Request, trace: TraceContext, ready_s: float | None, now: float, error: TandemError | None
) -> list[Span]:
    """What brought the prompt's KV here, if anything did, and how long it was waited for."""
    times, address = request.times, request.submit.prefill_address
    if not address:
        return []
    waiting = Phases(trace, now)
    # Who waited for blocks in vain computes the prompt itself.
    waiting.add(PULL_QUEUE, times.arrived_s, times.pull_started_s or times.compute_started_s)
    if times.pull_started_s is None:
        return waiting.spans
    end_s = _pull_end_s(times, ready_s, now)
    pull = trace.child(PULL)
    inside = Phases(pull, end_s)
    inside.add(KV_TRANSFER, times.kv_began_s, ready_s)
    if times.compute_started_s is None:
        inside.add(KV_EXPOSED, times.first_token_s, ready_s)
    failure = error if error is not None and error.is_of_prefill else None
    attributes: dict[str, Value] = {"server.address": address, "tandem.kv_bytes": request.kv_bytes}
    attributes["tandem.kv_bytes_before_first_token"] = request.kv_bytes_before_first_token
    error_type, problem = how_failed(failure)
    own = Span(PULL, pull, times.pull_started_s, end_s, "client", attributes, error_type, problem)
    return [*waiting.spans, own, *inside.spans]


def _pull_end_s(times: Timeline, ready_s: float | None, now: float) -> float:
    if times.compute_started_s is not None:
        return max(times.compute_started_s, times.pull_started_s or 0.0)
    return now if ready_s is None else ready_s
