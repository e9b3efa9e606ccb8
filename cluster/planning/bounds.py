"""Rates that no arrangement of a kind goes beyond, by arithmetic: what a placement search need not emulate.

Each bound lets those requests miss that cost most, so none of them is below what a scheduler with the best of luck
reaches:

    prefill    the M/D/1 queue of the shortest prompts (cluster/planning/queueing.py)
    decode     the best batch that memory holds and TPOT allows, always full
    colocated  prompts at their best rate, and rows that ride along in prompts' steps for what they add to them
    links      bytes of KV over bytes a second (cluster/planning/placement.py)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.planning.arrangement import Arrangement, Parallel
from cluster.planning.placement import Links
from cluster.planning.queueing import shortest_prompts
from cluster.planning.steady_rates import SteadyCost
from cluster.planning.trace import PREFIX_BLOCK_TOKENS, Trace
from engine.errors import ConfigError
from engine.objectives import Objectives
from engine.step_cost import StepCost, StepWork

# Requests that a bound is taken from: evenly spread over the sorted lengths of a long trace.
SAMPLE = 200
# Decode batches that are looked at, four per octave up to 512.
BATCHES = tuple(sorted({round(2 ** (quarter / 4)) for quarter in range(4 * 9 + 1)}))


class PlanCost(SteadyCost, StepCost, Protocol):
    """What the planner asks of a cost model; cluster/planning/cost_model.py has it."""

    @property
    def gpus(self) -> int: ...

    def kv_bytes(self, tokens: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Lengths:
    """What requests ask for, without their times: (prompt tokens to compute, prompt tokens in all, output tokens)."""

    rows: tuple[tuple[int, int, int], ...]

    @property
    def mean_prompt(self) -> float:
        """Tokens to compute."""
        return sum(row[0] for row in self.rows) / len(self.rows)

    @property
    def mean_kv(self) -> float:
        """Tokens of KV of a prompt, cached ones included."""
        return sum(row[1] for row in self.rows) / len(self.rows)

    @property
    def mean_output(self) -> float:
        return sum(row[2] for row in self.rows) / len(self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the request with the largest KV."""
        return max(row[1] + row[2] for row in self.rows)

    def sample(self, count: int = SAMPLE) -> Lengths:
        """Requests evenly spread over the order of their prompts."""
        ordered = sorted(self.rows)
        if len(ordered) <= count:
            return Lengths(tuple(ordered))
        return Lengths(tuple(ordered[(2 * index + 1) * len(ordered) // (2 * count)] for index in range(count)))


def lengths_of(trace: Trace) -> Lengths:
    """Blocks that an earlier request had are taken off the prompts to compute: a prefix cache that forgets nothing.
    Raises ConfigError for an empty trace."""
    if not len(trace):
        raise ConfigError("trace: holds no request, expected at least one")
    seen: set[int] = set()
    rows = []
    for request in trace.requests:
        known = 0
        while known < len(request.prefix_hashes) and request.prefix_hashes[known] in seen:
            known += 1
        seen.update(request.prefix_hashes)
        new_tokens = max(1, request.prompt_tokens - known * PREFIX_BLOCK_TOKENS)
        rows.append((new_tokens, request.prompt_tokens, request.output_tokens))
    return Lengths(tuple(rows))


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound of the rate, and what sets it, in words."""

    rps: float
    reason: str


def prefill_bound(cost: PlanCost, lengths: Lengths, ttft_s: float | None, target: float, count: int = 1) -> Bound:
    """Of `count` prefill workers. A prompt alone takes its latency; among others, its tokens' share of full steps."""
    sample, limit_s = lengths.sample(), math.inf if ttft_s is None else ttft_s
    latencies_s = [cost.prefill_s(row[0], row[1] - row[0]) for row in sample.rows]
    token_s = cost.step_s(StepWork(((cost.saturation_tokens, 0),))) / cost.saturation_tokens
    intervals_s = [min(latency_s, row[0] * token_s) for row, latency_s in zip(sample.rows, latencies_s, strict=True)]
    queue = shortest_prompts(latencies_s, intervals_s, count, limit_s, target)
    if queue is None:
        best_ms = min(latencies_s) * 1e3
        return Bound(0.0, f"M/D/1: too many prompts alone take longer than TTFT (the shortest {best_ms:.0f} ms)")
    all_rps = queue.highest_rate_rps(limit_s)
    reason = f"M/D/1 of prompts, with refusals ({all_rps:.3g} req/s keep TTFT on average without)"
    return Bound(queue.highest_admitted_rps(limit_s, target), reason)


def decode_bound(cost: PlanCost, lengths: Lengths, tpot_s: float | None, target: float, count: int = 1) -> Bound:
    """Of `count` decode workers, each with a full batch of the shorter answers at all times."""
    steps, context = _decode_work(lengths, target)
    if steps == 0:
        return Bound(math.inf, "no decode steps")
    best_rps = 0.0
    for batch, step_s in _batches(cost, context):
        if tpot_s is None or step_s <= tpot_s:
            best_rps = max(best_rps, batch / (step_s * steps))
    if best_rps == 0.0:
        return Bound(0.0, f"one row's step of {cost.decode_s(1, round(context)) * 1e3:.0f} ms is over TPOT")
    return Bound(count * best_rps / target, "full decode batches")


def colocated_bound(cost: PlanCost, lengths: Lengths, objectives: Objectives, target: float, count: int = 1) -> Bound:
    """Of `count` colocated workers: a row in a prompt's step costs what it adds to that step."""
    prompts = prefill_bound(cost, lengths, objectives.ttft_s, target, count)
    rows = decode_bound(cost, lengths, objectives.tpot_s, target, count)
    if min(prompts.rps, rows.rps) == 0.0:
        return min(prompts, rows, key=lambda bound: bound.rps)
    kept = sorted(row[0] for row in lengths.rows)[: math.ceil(target * len(lengths.rows))]
    token_s = cost.step_s(StepWork(((cost.saturation_tokens, 0),))) / cost.saturation_tokens
    steps, context = _decode_work(lengths, target)
    chunk = ((cost.saturation_tokens, 0),)
    alone_s = cost.step_s(StepWork(chunk))
    # Answers of one token take no decode step.
    batches = _batches(cost, context) if steps else []
    row_s = min(
        ((cost.step_s(StepWork(chunk, batch, round(batch * context))) - alone_s) / batch for batch, _ in batches),
        default=0.0,
    )
    busy_s = token_s * sum(kept) / len(kept) + steps * max(0.0, row_s)
    both = Bound(count / busy_s / target, "prompts and rows on the same GPUs")
    return min(prompts, rows, both, key=lambda bound: bound.rps)


def arrangement_bound(
    arrangement: Arrangement,
    costs: Mapping[Parallel, PlanCost],
    lengths: Lengths,
    objectives: Objectives,
    links: Links,
    target: float,
    *,
    allow_local: bool = False,
) -> Bound:
    """The tightest bound of an arrangement's pools and links. `allow_local`: decode workers may compute prompts too,
    and those need no link."""
    units = arrangement.units
    if arrangement.colocated is not None:
        pool = arrangement.colocated
        return colocated_bound(costs[pool.parallel], lengths, objectives, target, pool.count * units)
    assert arrangement.prefill is not None
    assert arrangement.decode is not None
    prefill, decode = arrangement.prefill, arrangement.decode
    prompts = prefill_bound(costs[prefill.parallel], lengths, objectives.ttft_s, target, units * prefill.count)
    link_rps = links.capacity_rps(arrangement)
    if allow_local:
        local = prefill_bound(costs[decode.parallel], lengths, objectives.ttft_s, target, units * decode.count)
        prompts = Bound(prompts.rps + local.rps, f"{prompts.reason}, on all workers")
        link_rps += local.rps
    bounds = (
        prompts,
        decode_bound(costs[decode.parallel], lengths, objectives.tpot_s, target, units * decode.count),
        Bound(link_rps, "KV over the links"),
    )
    return min(bounds, key=lambda bound: bound.rps)


def _decode_work(lengths: Lengths, target: float) -> tuple[float, float]:
    """(decode steps, mean context in them) of the shorter answers."""
    kept = sorted(lengths.rows, key=lambda row: row[2])[: math.ceil(target * len(lengths.rows))]
    steps = [max(0, row[2] - 1) for row in kept]
    total = sum(steps)
    if total == 0:
        return 0.0, 0.0
    context = sum(count * (row[1] + count / 2) for count, row in zip(steps, kept, strict=True)) / total
    return total / len(kept), context


def _batches(cost: PlanCost, context: float) -> list[tuple[int, float]]:
    """(rows, seconds of a step) of the batches that memory holds."""
    held = max(1, int(cost.kv_capacity_tokens / context))
    sizes = sorted({*(batch for batch in BATCHES if batch <= held), min(held, BATCHES[-1])})
    return [(batch, cost.decode_s(batch, round(batch * context))) for batch in sizes]
