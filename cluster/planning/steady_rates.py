"""Steady rates: how many requests a second an arrangement carries when they come evenly, by arithmetic alone.

AIConfigurator's method (NVIDIA, arXiv 2601.06288), on this project's cost model. No arrival process and no queue: what
it leaves out is what the emulator adds. It ranks a thousand arrangements in a second or two, so it says which of them
the emulator should look at.

    disaggregated   min(0.90 · prefill workers · 1 / prompt seconds, 0.92 · decode workers · batch / answer seconds)
    colocated       steps of whole prompts beside the batch's other rows, then steps of rows alone, in turn

The factors are somebody's experience, so they have a name and one place: `SteadyAssumptions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.planning.arrangement import Arrangement, Parallel, Pool
from engine.objectives import Objectives
from engine.step_cost import StepWork


class SteadyCost(Protocol):
    """What is asked of a cost model here; cluster/planning/cost_model.py has it."""

    @property
    def kv_capacity_tokens(self) -> int: ...

    def step_s(self, work: StepWork) -> float: ...

    def prefill_s(self, new_tokens: int, context: int = 0, chunk_tokens: int | None = None) -> float: ...

    def decode_s(self, rows: int, context_tokens: int) -> float: ...


@dataclass(frozen=True, slots=True)
class SteadyLoad:
    """Requests all alike, and what each is to achieve."""

    prompt_tokens: int
    output_tokens: int
    objectives: Objectives

    @property
    def mean_context(self) -> int:
        """Tokens that a decode row reads, halfway through its answer."""
        return self.prompt_tokens + self.output_tokens // 2


@dataclass(frozen=True, slots=True)
class SteadyAssumptions:
    """Corrections from theory to experience, and the grids that are searched.

    `prefill_time`, `decode_time`: multiply the times of disaggregated workers. `prefill_share`, `decode_share`: part of
    a pool's rate that is reached when the other one feeds or drains it. `waiting`: first tokens of a prefill pool come
    so many times later than the prompt alone takes. `prompt_overhead_s`: a colocated prompt's time outside the steps.
    `waiting_per_doubling`, `most_waiting`: a colocated batch of b has its first tokens 1 + log2(b) times the former
    later, and at most the latter. `prompt_step_tokens`: a mixed step holds whole prompts, of so many tokens together at
    most (and two prompts in any case).
    """

    name: str
    prefill_time: float = 1.0
    decode_time: float = 1.0
    prefill_share: float = 1.0
    decode_share: float = 1.0
    waiting: float = 1.0
    prompt_overhead_s: float = 0.0
    waiting_per_doubling: float = 0.0
    most_waiting: float = 1.0
    prompt_step_tokens: int = 8192
    decode_batches: tuple[int, ...] = ()
    colocated_batches: tuple[int, ...] = ()
    most_workers: int = 32


_DECODE_BATCHES = (*range(1, 16), *range(16, 32, 2), *range(32, 128, 4), *range(128, 512, 8), 512)
_COLOCATED_BATCHES = (
    *range(1, 16),
    *range(16, 32, 4),
    *range(32, 64, 8),
    *range(64, 256, 16),
    *range(256, 512, 32),
    512,
)

# Rates that differ by less are the same limit, summed up otherwise.
SAME_RATE = 1e-6

# Nothing but the cost model's own times.
PLAIN = SteadyAssumptions("plain", decode_batches=_DECODE_BATCHES, colocated_batches=_COLOCATED_BATCHES)


def aiconfigurator(num_layers: int) -> SteadyAssumptions:
    """AIConfigurator 0.12's, for vLLM and a model of so many layers: read from its source, and checked against what it
    prints (bench/aiconfigurator_check.py). The waiting factor of colocated first tokens is 1 + log2(batch)/8, at
    most 2, and each layer costs a prompt 0.8 ms outside the kernels."""
    return SteadyAssumptions(
        "AIConfigurator 0.12, vLLM",
        prefill_time=1.1,
        decode_time=1.08,
        prefill_share=0.90,
        decode_share=0.92,
        waiting=1.8,
        prompt_overhead_s=0.8e-3 * num_layers,
        waiting_per_doubling=1 / 8,
        most_waiting=2.0,
        decode_batches=_DECODE_BATCHES,
        colocated_batches=_COLOCATED_BATCHES,
    )


@dataclass(frozen=True, slots=True)
class SteadyPoint:
    """One arrangement at one batch size. `batch`: rows of one decoding worker. Rates in requests per second, of all its
    GPUs together; `limit` names the pool that holds the rate down."""

    arrangement: Arrangement
    batch: int
    rate_rps: float
    ttft_s: float
    tpot_s: float
    limit: str = ""

    @property
    def rps_per_gpu(self) -> float:
        return self.rate_rps / self.arrangement.gpus

    @property
    def tokens_s_user(self) -> float:
        return math.inf if self.tpot_s <= 0 else 1 / self.tpot_s


# The cost of one worker of a parallelism; None where the model does not fit.
Costs = Callable[[Parallel], SteadyCost | None]


def rank(
    load: SteadyLoad, gpus: int, parallels: Sequence[Parallel], costs: Costs, assumptions: SteadyAssumptions = PLAIN
) -> list[SteadyPoint]:
    """Every arrangement's best point that keeps the objectives, on `gpus` GPUs; best rate first, ties by speed.

    One row for each parallelism of colocated workers, and for each pair of parallelisms with its best counts.
    """
    known = [(parallel, cost) for parallel in parallels if parallel.gpus <= gpus and (cost := costs(parallel))]
    points: list[SteadyPoint] = []
    for parallel, cost in known:
        candidates = [point for point in colocated_points(load, parallel, cost, assumptions) if _keeps(point, load)]
        if candidates:
            best = max(candidates, key=_merit)
            points.append(_replicated(best, gpus))
    pairs = ((prefill, decode) for prefill in known for decode in known)
    for (prefill, prefill_cost), (decode, decode_cost) in pairs:
        best_pair = _matched(load, gpus, (prefill, prefill_cost), (decode, decode_cost), assumptions)
        points += [best_pair] if best_pair is not None else []
    return sorted(points, key=_merit, reverse=True)


def best_of(points: Iterable[SteadyPoint], kind: str) -> SteadyPoint | None:
    """The best point of one kind of arrangement."""
    return max((point for point in points if point.arrangement.kind == kind), key=_merit, default=None)


# ── one worker ───────────────────────────────────────────────────────────────────────────────────────────────────────


def prefill_worker(load: SteadyLoad, cost: SteadyCost, assumptions: SteadyAssumptions) -> tuple[float, float]:
    """(requests per second of one prefill worker, seconds to the first token): a prompt at a time."""
    prompt_s = cost.prefill_s(load.prompt_tokens) * assumptions.prefill_time
    return 1 / prompt_s, prompt_s * assumptions.waiting


def decode_points(
    load: SteadyLoad, cost: SteadyCost, assumptions: SteadyAssumptions
) -> Iterator[tuple[int, float, float]]:
    """(batch, requests per second, seconds per token) of one decode worker, for each batch that its memory holds and
    that keeps TPOT."""
    steps = max(1, load.output_tokens - 1)
    for batch in assumptions.decode_batches:
        if batch * (load.prompt_tokens + load.output_tokens) > cost.kv_capacity_tokens:
            return
        tpot_s = cost.decode_s(batch, batch * load.mean_context) * assumptions.decode_time
        if load.objectives.tpot_s is None or tpot_s < load.objectives.tpot_s:
            yield batch, batch / (tpot_s * steps), tpot_s


def colocated_points(
    load: SteadyLoad, parallel: Parallel, cost: SteadyCost, assumptions: SteadyAssumptions
) -> Iterator[SteadyPoint]:
    """One colocated worker, for each batch that its memory holds and each number of prompts in a mixed step."""
    for batch in assumptions.colocated_batches:
        if batch * (load.prompt_tokens + load.output_tokens) > cost.kv_capacity_tokens:
            return
        most = max(2, max(assumptions.prompt_step_tokens, 2 * load.prompt_tokens) // load.prompt_tokens)
        for prompts in range(1, most + 1):
            if prompts > batch or (batch > 1 and batch - prompts < 1):
                break
            yield _colocated_point(load, parallel, cost, assumptions, batch, prompts)


def _colocated_point(
    load: SteadyLoad, parallel: Parallel, cost: SteadyCost, assumptions: SteadyAssumptions, batch: int, prompts: int
) -> SteadyPoint:
    """Of the `output_tokens` steps in which a batch is answered, ceil(batch / prompts) carry whole prompts beside the
    rows; the rest carry rows only. Little's law caps the rate where first tokens wait."""
    rows = max(1, batch - prompts) if batch > 1 else 0
    mixed_s = cost.step_s(StepWork(((load.prompt_tokens, 0),) * prompts, rows, rows * load.mean_context))
    alone_s = cost.decode_s(batch, batch * load.mean_context)
    mixed = math.ceil(batch / prompts)
    alone = max(0, load.output_tokens - mixed)
    total_s = mixed * mixed_s + alone * alone_s
    tpot_s = alone_s if batch == 1 else total_s / (mixed + alone)
    waiting = min(1 + assumptions.waiting_per_doubling * math.log2(batch), max(1.0, assumptions.most_waiting))
    ttft_s = (mixed_s + assumptions.prompt_overhead_s) * waiting
    rate_rps = batch / max(total_s, ttft_s + tpot_s * max(0, load.output_tokens - 1))
    return SteadyPoint(Arrangement(colocated=Pool(parallel, 1)), batch, rate_rps, ttft_s, tpot_s)


# ── many workers ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _matched(
    load: SteadyLoad,
    gpus: int,
    prefill: tuple[Parallel, SteadyCost],
    decode: tuple[Parallel, SteadyCost],
    assumptions: SteadyAssumptions,
) -> SteadyPoint | None:
    """Rate matching: the counts and the decode batch that carry most on `gpus` GPUs, repeated as often as they fit.

    Where prefill is the limit, many batches carry the same; then it is the one with the most to spare: TPOT is told as
    it is with decode workers full.
    """
    prefill_rps, ttft_s = prefill_worker(load, prefill[1], assumptions)
    if load.objectives.ttft_s is not None and ttft_s >= load.objectives.ttft_s:
        return None
    best: SteadyPoint | None = None
    batches = sorted(decode_points(load, decode[1], assumptions), key=lambda point: point[1], reverse=True)
    for batch, decode_rps, tpot_s in batches:
        for decodes in range(1, min(assumptions.most_workers, gpus // decode[0].gpus) + 1):
            room = (gpus - decodes * decode[0].gpus) // prefill[0].gpus
            for prefills in range(1, min(assumptions.most_workers, room) + 1):
                fed_rps = assumptions.prefill_share * prefills * prefill_rps
                drained_rps = assumptions.decode_share * decodes * decode_rps
                unit = prefills * prefill[0].gpus + decodes * decode[0].gpus
                rate_rps = gpus // unit * min(fed_rps, drained_rps)
                if best is None or rate_rps > best.rate_rps * (1 + SAME_RATE):
                    arrangement = Arrangement(Pool(prefill[0], prefills), Pool(decode[0], decodes), units=gpus // unit)
                    limit = "prefill" if fed_rps <= drained_rps else "decode"
                    best = SteadyPoint(arrangement, batch, rate_rps, ttft_s, tpot_s, limit)
    return best


def _replicated(point: SteadyPoint, gpus: int) -> SteadyPoint:
    pool = point.arrangement.colocated
    assert pool is not None
    count = gpus // pool.parallel.gpus
    return SteadyPoint(
        Arrangement(colocated=Pool(pool.parallel, count)),
        point.batch,
        count * point.rate_rps,
        point.ttft_s,
        point.tpot_s,
    )


def _keeps(point: SteadyPoint, load: SteadyLoad) -> bool:
    return load.objectives.has_ttft(point.ttft_s) and load.objectives.has_tpot(point.tpot_s)


def _merit(point: SteadyPoint) -> tuple[float, float, int]:
    """More requests first; of equal ones (to SAME_RATE) the faster for its users, then the smaller."""
    return (float(f"{point.rate_rps:.6g}"), -float(f"{point.tpot_s:.6g}"), -point.arrangement.gpus)
