"""What recent requests ask of each pool, in workers' worth, and how much of it a pool bears. Pure.

    prefill  Σ seconds of the arrived prompts, alone            per second
    decode   Σ tokens of the answers / what one worker decodes  per second, at the largest batch that keeps TPOT

A pool of n workers bears less than n: arrivals come in bunches, and the objectives leave only so much room to wait.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from cluster.answer_share import KEEP, AnswerShare
from cluster.routing.costs import riding_s
from engine.objectives import Objectives

# No pool is asked to be busier than this, whatever the objectives allow.
MOST_BUSY = 0.95
# Where an objective cannot be met at all, pools are balanced as if this were what they bear.
LEAST_BUSY = 0.5
# Before so many answers it is not known how long answers are.
ANSWERS_MIN = 20
# Batch size that no worker is thought to exceed.
ROWS_MAX = 1024
# Of a TPOT objective, what the steps of a planned batch may take: prompts and new neighbours take the rest.
TPOT_PART = 0.9


class Cost(Protocol):
    """Of cluster/planning/cost_model.py's CostModel, what is asked here."""

    @property
    def saturation_tokens(self) -> int: ...

    def prefill_s(self, new_tokens: int, context: int = 0, chunk_tokens: int | None = None) -> float: ...

    def decode_s(self, rows: int, context_tokens: int) -> float: ...


@dataclass(frozen=True, slots=True)
class Demand:
    """`prefill` and `decode` in workers' worth, of so many `requests`: 0 where too little is known.

    `prompt_s`: mean seconds of a prompt alone; `residual_s`: E[s²]/E[s] of the same, which grows with their spread.
    `answer_s`: seconds of one worker that an answer takes. `rows`: sequences that one decode worker runs within TPOT.
    `ttft_s` None: no such objective. `mix`: which pool the work is for, as ln(prefill / decode) by the cost models as
    they were: neither a flip nor what the workers learn of themselves can change it. `local_cost`: what a prompt takes
    of a decode worker among its decode steps, over what it takes of a prefill worker. `has_local`: prompts go there
    though there are prefill workers.
    """

    requests: int
    prefill: float
    decode: float
    prompt_s: float
    residual_s: float
    answer_s: float
    rows: int
    ttft_s: float | None
    mix: float = 0.0
    local_cost: float = 1.0
    has_local: bool = False


@dataclass(frozen=True, slots=True)
class _Arrival:
    at_s: float
    prompt_tokens: int
    new_tokens: int
    prompt_s: float
    max_tokens: int
    ttft_s: float | None
    tpot_s: float | None


class DemandMeter:
    """Adds up the arrivals of the last `window_s` seconds. Rejected requests are demand like all others.

    `max_rows` bounds a decode worker's batch beside TPOT and memory. A decode worker computes prompts in steps of
    `local_chunk_tokens`, None for the saturation length, and `has_local` says whether it does so unless it must.
    """

    def __init__(
        self,
        prefill_cost: Cost,
        decode_cost: Cost,
        window_s: float,
        max_rows: int = ROWS_MAX,
        *,
        local_chunk_tokens: int | None = None,
        has_local: bool = False,
    ) -> None:
        self._local_chunk = local_chunk_tokens or decode_cost.saturation_tokens
        self._has_local = has_local
        self._prefill_cost = prefill_cost
        self._decode_cost = decode_cost
        self._window_s = window_s
        self._max_rows = max_rows
        self._arrivals: deque[_Arrival] = deque()
        self._first_s: float | None = None
        self._shares = AnswerShare()
        self._prompt_tokens, self._cached_tokens = 1.0, 0.0

    def arrived(self, prompt_tokens: int, max_tokens: int, objectives: Objectives, now: float) -> None:
        """A request came. How much of `max_tokens` it will use, and how much of its prompt is cached somewhere, is
        taken from those that have ended."""
        new_tokens = max(1, round(prompt_tokens * (1.0 - self._cached_tokens / self._prompt_tokens)))
        prompt_s = self._prefill_cost.prefill_s(new_tokens, prompt_tokens - new_tokens)
        self._arrivals.append(
            _Arrival(now, prompt_tokens, new_tokens, prompt_s, max_tokens, objectives.ttft_s, objectives.tpot_s)
        )
        if self._first_s is None:
            self._first_s = now
        # Here too: nobody may ask for the demand, as long as there is no worker.
        self._forget(now)

    def ended(self, prompt_tokens: int, cached_tokens: int, max_tokens: int, answer_tokens: int) -> None:
        """A request was answered in full."""
        self._shares.ended(prompt_tokens, max_tokens, answer_tokens)
        self._prompt_tokens = KEEP * self._prompt_tokens + prompt_tokens
        self._cached_tokens = KEEP * self._cached_tokens + min(cached_tokens, prompt_tokens)

    def demand(self, now: float, kv_tokens: int | None = None, scales: tuple[float, float] = (1.0, 1.0)) -> Demand:
        """Of the last window. `kv_tokens`: what a decode worker's pool holds; `scales`: how many times longer than the
        cost models say the workers take, by their own measurement (prefill, decode)."""
        self._forget(now)
        arrivals = self._arrivals
        if not arrivals or self._first_s is None or self._shares.answers < ANSWERS_MIN:
            return Demand(0, 0.0, 0.0, 0.0, 0.0, 0.0, 1, None)
        span_s = max(min(self._window_s, now - self._first_s), 1e-3)
        prompts_s = scales[0] * math.fsum(arrival.prompt_s for arrival in arrivals)
        squares = scales[0] ** 2 * math.fsum(arrival.prompt_s**2 for arrival in arrivals)
        # The first token is drawn by the prefill.
        answers = [
            (max(0.0, self._shares.of(arrival.prompt_tokens) * arrival.max_tokens - 1.0), arrival.prompt_tokens)
            for arrival in arrivals
        ]
        tokens = math.fsum(answer for answer, _ in answers)
        context = math.fsum(answer * (prompt + answer / 2.0) for answer, prompt in answers) / max(tokens, 1e-9)
        tpot_s = _mean(arrival.tpot_s for arrival in arrivals)
        rows, token_s = self._batch(context, tpot_s, kv_tokens, scales[1])
        _, plain_s = self._batch(context, tpot_s, kv_tokens, 1.0)
        return Demand(
            requests=len(arrivals),
            prefill=prompts_s / span_s,
            decode=tokens * token_s / span_s,
            prompt_s=prompts_s / len(arrivals),
            residual_s=squares / max(prompts_s, 1e-12),
            answer_s=tokens * token_s / len(arrivals),
            rows=rows,
            ttft_s=_mean(arrival.ttft_s for arrival in arrivals),
            mix=math.log((prompts_s / scales[0] / span_s + 1e-9) / (tokens * plain_s / span_s + 1e-9)),
            local_cost=self._local_cost(arrivals),
            has_local=self._has_local,
        )

    def _forget(self, now: float) -> None:
        while self._arrivals and self._arrivals[0].at_s <= now - self._window_s:
            self._arrivals.popleft()

    def _local_cost(self, arrivals: Iterable[_Arrival]) -> float:
        """By the mean prompt."""
        new_tokens = max(1, round(statistics.fmean(arrival.new_tokens for arrival in arrivals)))
        alone_s = self._decode_cost.prefill_s(new_tokens, 0, self._local_chunk)
        local_s = riding_s(alone_s, -(-new_tokens // self._local_chunk), self._decode_cost.decode_s(1, 1))
        return local_s / self._prefill_cost.prefill_s(new_tokens)

    def _batch(self, context: float, tpot_s: float | None, kv_tokens: int | None, scale: float) -> tuple[int, float]:
        """Rows of the largest batch within TPOT and memory, and seconds of a worker that each of its tokens takes."""
        most = self._max_rows
        if kv_tokens is not None:
            most = min(most, int(kv_tokens / max(context, 1.0)))
        fewest, most = 1, max(1, most)

        def step_s(rows: int) -> float:
            return scale * self._decode_cost.decode_s(rows, round(rows * context))

        limit_s = math.inf if tpot_s is None else TPOT_PART * tpot_s
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fewest, most = (middle, most) if step_s(middle) <= limit_s else (fewest, middle - 1)
        return fewest, step_s(fewest) / fewest


def bearable_prefill(demand: Demand, workers: int, target: float) -> float:
    """Workers' worth of prompts that `workers` compute within TTFT for a share `target` of the requests.

    P(wait > t) ≈ ρ·exp(−2n(1−ρ)t/r) in a queue of n servers with residual r = E[s²]/E[s] (heavy traffic; Kingman 1962,
    Kollerstrom 1974). t is what TTFT leaves beside the prompt itself.
    """
    busy = MOST_BUSY
    if demand.ttft_s is not None:
        patience = 2.0 * workers * max(0.0, demand.ttft_s - demand.prompt_s) / max(demand.residual_s, 1e-9)
        low, high = LEAST_BUSY, MOST_BUSY
        for _ in range(20):
            busy = (low + high) / 2
            is_fine = busy * math.exp(-patience * (1.0 - busy)) <= 1.0 - target
            low, high = (busy, high) if is_fine else (low, busy)
    return workers * busy


def bearable_decode(demand: Demand, workers: int) -> float:
    """Workers' worth of answers that `workers` decode within TPOT, nine times in ten: a Poisson number of sequences,
    of which all workers together hold n·rows."""
    busy = 1.0 - 1.28 / math.sqrt(workers * demand.rows)
    return workers * min(MOST_BUSY, max(LEAST_BUSY, busy))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
