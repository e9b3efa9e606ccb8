"""DistServe's artifact search by its own rules: what is needed to tell a difference of rules from one of lengths.

Its simulator (LLMServe/DistServe, simdistserve, read at 82831f1; nothing of it is used here) differs from a cluster in
these points, which this file keeps:

- a prefill worker takes every prompt that waits into one step, of any length, and adds 1 ms to it
- a decode worker takes every sequence there is; KV moves in no time, and memory never runs out
- a request of n output tokens decodes n steps after its first token, and TPOT is their time over n
- the 90th percentiles of TTFT and of TPOT must each be below their objectives: up to 20 % of requests may miss one
- rates for each GPU are bisected between 0 and 5 until the bracket is narrower than 0.25: answers are multiples of 5/32
- a colocated worker of its vLLM runs prompts in steps of their own, before any decode step
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.objectives import Objectives
from engine.step_cost import StepWork

PREFILL_EXTRA_S = 1e-3
HIGHEST_RPS_PER_GPU, PRECISION = 5.0, 0.25

# Seconds of a step.
StepSeconds = Callable[[StepWork], float]


@dataclass(slots=True)
class _Request:
    arrival_s: float
    prompt: int
    output: int
    first_s: float = 0.0
    end_s: float = 0.0
    done: int = 0


def best_rate_rps(
    lengths: Sequence[tuple[int, int]],
    gpus: int,
    objectives: Objectives,
    prefill: StepSeconds,
    decode: StepSeconds,
    *,
    colocated: bool = False,
    precision: float = PRECISION,
    seed: int = 0,
) -> float:
    """Requests a second of one unit of `gpus` GPUs, by bisection; Poisson arrivals, the same draws at every rate."""
    low, high = 0.0, HIGHEST_RPS_PER_GPU
    while high - low > precision:
        middle = (low + high) / 2
        requests = _arriving(lengths, middle * gpus, seed)
        _colocated(requests, prefill, decode) if colocated else _disaggregated(requests, prefill, decode)
        low, high = (middle, high) if _are_kept(requests, objectives) else (low, middle)
    return low * gpus


def _arriving(lengths: Sequence[tuple[int, int]], rate_rps: float, seed: int) -> list[_Request]:
    rng, now, requests = random.Random(seed), 0.0, []
    for prompt, output in lengths:
        requests.append(_Request(now, prompt, output))
        now += rng.expovariate(rate_rps)
    return requests


def _disaggregated(requests: Sequence[_Request], prefill: StepSeconds, decode: StepSeconds) -> None:
    """Prefill to the end first: decode never holds it up."""
    now, waiting = 0.0, list(requests)
    while waiting:
        now = max(now, waiting[0].arrival_s)
        batch = [request for request in waiting if request.arrival_s <= now]
        now += prefill(_prompts(batch)) + PREFILL_EXTRA_S
        for request in batch:
            request.first_s = now
        waiting = waiting[len(batch) :]
    _decode(sorted(requests, key=lambda request: request.first_s), decode)


def _decode(coming: list[_Request], decode: StepSeconds) -> None:
    now, running = 0.0, list[_Request]()
    while coming or running:
        if not running:
            now = max(now, coming[0].first_s)
        while coming and coming[0].first_s <= now:
            running.append(coming.pop(0))
        now += _decode_step(running, now, decode)
        running = [request for request in running if request.done < request.output]


def _colocated(requests: Sequence[_Request], prefill: StepSeconds, decode: StepSeconds) -> None:
    now, waiting, running = 0.0, list(requests), list[_Request]()
    while waiting or running:
        if not running:
            now = max(now, waiting[0].arrival_s)
        batch = [request for request in waiting if request.arrival_s <= now]
        if batch:
            now += prefill(_prompts(batch)) + PREFILL_EXTRA_S
            for request in batch:
                request.first_s = now
            waiting = waiting[len(batch) :]
            running += batch
            continue
        now += _decode_step(running, now, decode)
        running = [request for request in running if request.done < request.output]


def _decode_step(running: Sequence[_Request], now: float, decode: StepSeconds) -> float:
    """One step of all of them: its seconds."""
    context = sum(request.prompt + request.done + 1 for request in running)
    step_s = decode(StepWork((), len(running), context))
    for request in running:
        request.done += 1
        request.end_s = now + step_s
    return step_s


def _prompts(batch: Sequence[_Request]) -> StepWork:
    return StepWork(tuple((request.prompt, 0) for request in batch))


def _are_kept(requests: Sequence[_Request], objectives: Objectives) -> bool:
    assert objectives.ttft_s is not None
    assert objectives.tpot_s is not None
    ttfts = sorted(request.first_s - request.arrival_s for request in requests)
    tpots = sorted((request.end_s - request.first_s) / request.output for request in requests)
    return _p90(ttfts) < objectives.ttft_s and _p90(tpots) < objectives.tpot_s


def _p90(ordered: Sequence[float]) -> float:
    place = 0.9 * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
