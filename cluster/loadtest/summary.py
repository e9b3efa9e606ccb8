"""Figures of a set of runs: percentiles, attainment, goodput, and what went wrong. See record.py for what times mean.

Attainment counts every request, and whatever was not answered as a miss. Rates are over a run's time from its first
arrival to its last end; goodput is the rate of requests that met both objectives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.loadtest.record import Record
from engine.objectives import Objectives

LATE_WARN_S = 0.005


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `count` times, in milliseconds."""

    p50: float
    p90: float
    p99: float
    max: float
    count: int


@dataclass(frozen=True, slots=True)
class Summary:
    """`*_rps`: requests per second. `ending` counts answered, rejected, timed_out, failed and given_up requests.
    `short_answers` have fewer tokens than asked for. `cached_share`: of the prompt tokens. `errors`: by message, the
    most frequent first."""

    requests: int
    ending: dict[str, int]
    attainment: float
    attainment_ttft: float
    attainment_tpot: float
    goodput_rps: float
    offered_rps: float
    achieved_rps: float
    duration_s: float
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2e_ms: Percentiles | None
    reject_ms: Percentiles | None
    late_ms: Percentiles | None
    prompt_tokens_mean: float
    output_tokens_mean: float
    output_tokens_per_s: float
    cached_share: float
    short_answers: int
    errors: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"rejected": self.ending.get("rejected", 0)}


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values, at least one, interpolated between neighbours."""
    assert values, "no values have no percentile"
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def summarise(runs: Sequence[Sequence[Record]], objectives: Objectives) -> Summary:
    """Pools runs of one load with different seeds. At least one run with a request."""
    records = [record for run in runs for record in run]
    assert records, "a summary of nothing"
    answered = [record for record in records if record.ending == "answered"]
    sent = [record for record in records if record.ending != "given_up"]
    duration_s = sum(map(_duration_s, runs)) or math.inf
    span_s = sum(run[-1].arrival_s - run[0].arrival_s for run in runs if run)
    prompt_tokens = sum(record.prompt_tokens for record in answered)
    output_tokens = sum(record.output_tokens for record in answered)
    return Summary(
        requests=len(records),
        ending=dict(sorted(Counter(record.ending for record in records).items())),
        attainment=_share(record.is_met(objectives) for record in records),
        attainment_ttft=_share(record.has_ttft(objectives) for record in records),
        attainment_tpot=_share(record.has_tpot(objectives) for record in records),
        goodput_rps=sum(record.is_met(objectives) for record in records) / duration_s,
        offered_rps=sum(len(run) - 1 for run in runs) / span_s if span_s > 0 else len(records) / duration_s,
        achieved_rps=len(answered) / duration_s,
        duration_s=0.0 if math.isinf(duration_s) else duration_s,
        ttft_ms=percentiles(record.ttft_s for record in answered if record.ttft_s is not None),
        tpot_ms=percentiles(record.tpot_s for record in answered if record.tpot_s is not None),
        itl_ms=percentiles(gap_s for record in answered for gap_s in record.gaps_s),
        e2e_ms=percentiles(record.end_s for record in answered),
        reject_ms=percentiles(record.end_s for record in records if record.ending == "rejected"),
        late_ms=percentiles(max(0.0, record.late_s) for record in sent),
        prompt_tokens_mean=prompt_tokens / len(answered) if answered else 0.0,
        output_tokens_mean=output_tokens / len(answered) if answered else 0.0,
        output_tokens_per_s=output_tokens / duration_s,
        cached_share=sum(record.cached_tokens for record in answered) / max(1, prompt_tokens),
        short_answers=sum(record.output_tokens < record.asked_tokens for record in answered),
        errors=dict(Counter(record.error for record in records if record.error).most_common()),
    )


def percentiles(seconds: Iterable[float]) -> Percentiles | None:
    """None of nothing."""
    ordered = sorted(1e3 * value for value in seconds)
    if not ordered:
        return None
    p50, p90, p99 = (round(percentile(ordered, share), 3) for share in (0.5, 0.9, 0.99))
    return Percentiles(p50, p90, p99, round(ordered[-1], 3), len(ordered))


def _duration_s(run: Sequence[Record]) -> float:
    sent = [record for record in run if record.ending != "given_up"]
    return max(record.done_s for record in sent) - sent[0].arrival_s if sent else 0.0


def _share(met: Iterable[bool]) -> float:
    flags = list(met)
    return sum(flags) / len(flags)
