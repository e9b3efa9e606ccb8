"""What is counted of every request when it ends."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator
from typing import get_args

from prometheus_client.metrics_core import Metric

from cluster.endings import Ended
from cluster.metrics.families import Counter, Histogram
from cluster.outcomes import NOT_COUNTED, Reason
from cluster.tally import Tally
from engine.request import FinishReason, Receipt

# Upper ends of classes: vLLM's where it has the same metric, and smaller ones for short times.
LATENCY_BOUNDS_S = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TPOT_BOUNDS_S = (
    *(0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
EXPOSED_BOUNDS_S = (0.0, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ERROR_BOUNDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)

# No phase takes longer.
MAX_S = 1e7
PHASES = ("gateway_queue", "prefill_queue", "prefill", "kv_exposed", "decode_queue", "decode", "retry")
OBJECTIVES = ("both", "ttft", "tpot")
ROUTES = ("split", "local")

REQUESTS = Counter(
    "requests", "Requests that came in good order and have ended, by how they ended.", labels=("outcome",)
)
SUCCESS = Counter(
    "request_success",
    "Choices of requests that a worker had, by why they ended; abort: the request broke off before.",
    labels=("finished_reason",),
)
ATTAINED = Counter(
    "requests_attained",
    "Requests that met both objectives, that for the first token, that for each token after it. The rate of both is "
    "the goodput in requests per second.",
    labels=("objective",),
)
ROUTED = Counter(
    "requests_routed",
    "Requests that ended after a worker had them: split between two workers, or local to one.",
    labels=("route",),
)
RETRIES = Counter("request_retries", "Attempts of requests that failed and were made again elsewhere.")
CACHED = Counter("cached_prompt_tokens", "Prompt tokens of finished requests that came from a prefix cache.")
PHASE_SECONDS = Counter(
    "request_phase_seconds",
    "Where the time of finished requests went, as in their receipts; phases follow one another without overlap.",
    labels=("phase",),
)
KV_BYTES = Counter("request_kv_bytes", "KV that moved between workers for finished requests.")
EARLY_KV_BYTES = Counter(
    "request_kv_bytes_before_first_token",
    "Of these, what had left the prefill worker before the first token was sampled.",
)
E2E = Histogram("e2e_request_latency_seconds", "From a request's arrival to the end of its answer, of finished ones.")
TPOT = Histogram(
    "request_time_per_output_token_seconds",
    "Mean time per token after the first, of finished requests with two tokens or more.",
)
QUEUE = Histogram(
    "request_queue_time_seconds", "What a finished request waited: at the gateway, for prefill and for its first step."
)
PREFILL = Histogram("request_prefill_time_seconds", "From a prompt's first chunk to its first token.")
DECODE = Histogram("request_decode_time_seconds", "From a finished request's first decode step to its last token.")
EXPOSED = Histogram(
    "kv_exposed_seconds",
    "From the first token to the last of the KV, at the decode worker, of finished requests that were split: what the "
    "user waits for KV.",
)
PROMPT_TOKENS = Histogram("request_prompt_tokens", "Prompt tokens of finished requests.")
GENERATION_TOKENS = Histogram("request_generation_tokens", "Tokens of the answers of finished requests.")
TTFT_ERROR = Histogram(
    "ttft_prediction_error_ratio",
    "How far the router's prediction of the time to first token was off, as a share of the actual time, of finished "
    "requests with a prediction.",
)
TPOT_ERROR = Histogram("tpot_prediction_error_ratio", "The same of the time per output token.")

COUNTERS = (REQUESTS, SUCCESS, ATTAINED, ROUTED, RETRIES, CACHED, PHASE_SECONDS, KV_BYTES, EARLY_KV_BYTES)
HISTOGRAMS = {
    E2E: LATENCY_BOUNDS_S,
    TPOT: TPOT_BOUNDS_S,
    QUEUE: LATENCY_BOUNDS_S,
    PREFILL: LATENCY_BOUNDS_S,
    DECODE: LATENCY_BOUNDS_S,
    EXPOSED: EXPOSED_BOUNDS_S,
    TTFT_ERROR: ERROR_BOUNDS,
    TPOT_ERROR: ERROR_BOUNDS,
}
TOKEN_HISTOGRAMS = (PROMPT_TOKENS, GENERATION_TOKENS)


class RequestMetrics:
    """Implements cluster.endings.Observer. Every series is there from the start, at 0. `max_context`: the model's, in
    tokens."""

    def __init__(self, max_context: int) -> None:
        self._outcomes: Counts[str] = Counts(dict.fromkeys(get_args(Reason), 0))
        self._finished: Counts[str] = Counts({reason.value: 0 for reason in FinishReason})
        self._attained: Counts[str] = Counts(dict.fromkeys(OBJECTIVES, 0))
        self._routed: Counts[str] = Counts(dict.fromkeys(ROUTES, 0))
        self._phases_s = dict.fromkeys(PHASES, 0.0)
        self._retries = self._cached = self._kv_bytes = self._early_kv_bytes = 0
        bounds = HISTOGRAMS | dict.fromkeys(TOKEN_HISTOGRAMS, _token_bounds(max_context))
        self._tallies = {declared: Tally(each) for declared, each in bounds.items()}

    def ended(self, request: Ended) -> None:
        outcome, receipt = request.outcome, request.receipt
        self._outcomes[outcome.reason] += 1
        if outcome.reason not in NOT_COUNTED:
            self._attained["ttft"] += outcome.met_ttft
            self._attained["tpot"] += outcome.met_tpot
            self._attained["both"] += outcome.met_ttft and outcome.met_tpot
        if receipt is None:
            return
        for reason in request.finish_reasons:
            self._finished[reason.value] += 1
        self._routed["local" if outcome.was_local else "split"] += 1
        self._retries += receipt.retries
        if outcome.reason == "finished":
            self._answered(request, receipt)

    def families(self, model: str) -> Iterator[Metric]:
        yield REQUESTS.family(model, _by_label(self._outcomes))
        yield SUCCESS.family(model, _by_label(self._finished))
        yield ATTAINED.family(model, _by_label(self._attained))
        yield ROUTED.family(model, _by_label(self._routed))
        yield PHASE_SECONDS.family(model, _by_label(self._phases_s))
        yield RETRIES.family(model, [((), self._retries)])
        yield CACHED.family(model, [((), self._cached)])
        yield KV_BYTES.family(model, [((), self._kv_bytes)])
        yield EARLY_KV_BYTES.family(model, [((), self._early_kv_bytes)])
        for declared, tally in self._tallies.items():
            yield declared.family(model, {(): tally})

    def _answered(self, request: Ended, receipt: Receipt) -> None:
        tallies, usage, choices = self._tallies, request.usage, len(request.finish_reasons)
        tallies[E2E].add(request.outcome.ended_s - request.arrived_s)
        tallies[PROMPT_TOKENS].add(usage.prompt_tokens)
        tallies[GENERATION_TOKENS].add(usage.completion_tokens)
        if usage.completion_tokens > choices:
            tallies[TPOT].add(receipt.tpot_s)
        for declared, predicted_s, actual_s in (
            (TTFT_ERROR, receipt.predicted_ttft_s, receipt.ttft_s),
            (TPOT_ERROR, receipt.predicted_tpot_s, receipt.tpot_s),
        ):
            if predicted_s > 0 and actual_s > 0:
                tallies[declared].add(abs(predicted_s - actual_s) / actual_s)
        if request.worker_told:
            self._worker_told(request, receipt)

    def _worker_told(self, request: Ended, receipt: Receipt) -> None:
        """Where the time went, which only workers know. Zeros in place of what was lost would hide the rest."""
        tallies = self._tallies
        phases_s = {phase: _believable(getattr(receipt, f"{phase}_s")) for phase in PHASES}
        for phase, seconds in phases_s.items():
            self._phases_s[phase] += seconds
        tallies[QUEUE].add(phases_s["gateway_queue"] + phases_s["prefill_queue"] + phases_s["decode_queue"])
        tallies[PREFILL].add(phases_s["prefill"])
        tallies[DECODE].add(phases_s["decode"])
        if not request.outcome.was_local:
            tallies[EXPOSED].add(phases_s["kv_exposed"])
        self._cached += request.usage.cached_tokens
        self._kv_bytes += receipt.kv_bytes
        self._early_kv_bytes += receipt.kv_bytes_before_first_token


def _token_bounds(max_context: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 and so on, up to `max_context`."""
    powers = (10.0**power for power in range(len(str(max_context))))
    return tuple(bound for power in powers for bound in (power, 2 * power, 5 * power) if bound <= max_context)


def _believable(seconds: float) -> float:
    """Most of a receipt is what a worker says. A sum must not go down, or be none any more."""
    return seconds if 0 <= seconds < MAX_S else 0.0


def _by_label(values: Counts[str] | dict[str, float]) -> list[tuple[tuple[str, ...], float]]:
    return [((label,), value) for label, value in values.items()]
