"""The gateway's spans of a request: itself, its wait for a place, its ways to workers, and what each of them took.

    chat MODEL                     arrival ─────────────────────────────────────────▶ the end of its answer
      gateway queue                arrival ─▶ a place
      route, attempt                          a place ─▶ handed over ─▶ answered, or failed
      route, attempt                                                    failed ─▶ handed over again ─▶ …

Implements cluster.endings.Observer.
"""

from __future__ import annotations

from cluster.endings import Ended
from cluster.run import ATTEMPT, Attempt
from cluster.tracing.span import Phases, Sink, Span, Value
from engine.trace_context import TraceContext

# The request's own span is named as the conventions for generative AI say, by what is asked for, and of whom.
CHAT = "chat"
COMPLETION = "text_completion"
QUEUE = "gateway queue"
ROUTE = "route"
# Nobody's fault, as far as this side knows.
NO_ERROR = ("finished", "cancelled")


class GatewaySpans:
    """`model` is the one that is served."""

    def __init__(self, sink: Sink, model: str) -> None:
        self._sink = sink
        self._model = model

    def ended(self, request: Ended) -> None:
        if request.trace is not None and request.trace.is_sampled:
            self._sink.write(self._spans(request, request.trace))

    def _spans(self, request: Ended, trace: TraceContext) -> list[Span]:
        end_s = request.outcome.ended_s
        phases = Phases(trace, end_s)
        phases.add(QUEUE, request.arrived_s, request.admitted_s)
        spans = [self._own(request, trace), *phases.spans]
        free_s = request.admitted_s
        for number, attempt in enumerate(request.attempts):
            phases = Phases(trace, end_s)
            phases.add(ROUTE, free_s, attempt.submitted_s, number)
            spans += [*phases.spans, _attempt(trace, attempt, number, end_s)]
            free_s = attempt.ended_s
        # It found no worker, or no other one.
        if request.outcome.reason != "finished" and free_s is not None and free_s < end_s:
            phases = Phases(trace, end_s)
            phases.add(ROUTE, free_s, None, len(request.attempts))
            spans += phases.spans
        return spans

    def _own(self, request: Ended, trace: TraceContext) -> Span:
        operation, reason = CHAT if request.is_chat else COMPLETION, request.outcome.reason
        is_error = reason not in NO_ERROR
        return Span(
            f"{operation} {self._model}",
            trace,
            request.arrived_s,
            request.outcome.ended_s,
            "server",
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "tandem",
                "gen_ai.request.model": self._model,
                **_asked(request),
                **_answered(request),
                "tandem.reason": reason,
            },
            reason if is_error else "",
            # What is wrong with a request is told in its client's own words.
            request.problem if is_error and reason != "invalid" else "",
        )


def _asked(request: Ended) -> dict[str, Value]:
    params = request.params
    asked: dict[str, Value] = {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.response.id": request.request_id,
    }
    if params.top_k > 0:
        asked["gen_ai.request.top_k"] = params.top_k
    if params.n > 1:
        asked["gen_ai.request.choice.count"] = params.n
    if request.tenant:
        asked["tandem.tenant"] = request.tenant
    return asked


def _answered(request: Ended) -> dict[str, Value]:
    usage, outcome, receipt = request.usage, request.outcome, request.receipt
    answered: dict[str, Value] = {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.response.finish_reasons": tuple(map(str, request.finish_reasons)),
    }
    if outcome.ttft_s is not None:
        answered["gen_ai.response.time_to_first_chunk"] = outcome.ttft_s
    if outcome.tpot_s is not None:
        answered["tandem.tpot_s"] = outcome.tpot_s
    if receipt is not None:
        answered["tandem.retries"] = receipt.retries
        answered["tandem.predicted_ttft_s"] = receipt.predicted_ttft_s
    return answered


def _attempt(trace: TraceContext, attempt: Attempt, number: int, end_s: float) -> Span:
    route = attempt.route
    where: dict[str, Value] = {"tandem.decode_worker": route.decode_id, "server.address": route.decode_address}
    if not route.is_local:
        where["tandem.prefill_worker"] = route.prefill_id
    return Span(
        ATTEMPT,
        trace.child(ATTEMPT, number),
        attempt.submitted_s,
        end_s if attempt.ended_s is None else attempt.ended_s,
        "client",
        where,
        attempt.error_type,
        attempt.problem,
    )
