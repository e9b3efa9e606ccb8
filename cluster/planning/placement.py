"""Which arrangements are worth judging: DistServe's two placement searches (OSDI '24, algorithms 1 and 2), as pure
functions of what one worker of each phase can carry.

    high affinity   links between nodes are fast: phases are judged apart, and any counts may be combined
    low affinity    KV must stay inside a node: the pools of one node are one unit, repeated on every node

Both take `PhaseRate`s, which the emulator or arithmetic has found, and answer with a short list of arrangements, best
first, for a judge of the whole. DistServe keeps one parallelism for each phase; here every pair of them stays in the
running until the counts are fitted to the GPUs there are, because what is best per GPU may not divide their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.planning.arrangement import Arrangement, Parallel, Pool

Affinity = Literal["high", "low"]
# What is maximised: requests a second of the whole cluster, or for each GPU that is used (DistServe's search).
Goal = Literal["cluster", "gpu"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An arrangement and what its phases say that it carries, in requests a second of all its GPUs."""

    arrangement: Arrangement
    estimate_rps: float

    def merit(self, goal: Goal) -> tuple[float, int]:
        """For `max`: the estimate, then fewer GPUs. Rates equal to a part in 10⁶ are the same limit, summed up
        otherwise."""
        rate_rps = self.estimate_rps if goal == "cluster" else self.estimate_rps / self.arrangement.gpus
        return float(f"{rate_rps:.6g}"), -self.arrangement.gpus


@dataclass(frozen=True, slots=True)
class Links:
    """What KV travels over. `bytes_s`: what one GPU can send, and receive, one way; `kv_bytes`: of a mean request."""

    bytes_s: float
    kv_bytes: float

    def capacity_rps(self, arrangement: Arrangement) -> float:
        """Requests a second whose KV the links carry: the pool with fewer GPUs is the narrow side. Infinite for
        colocated workers, which send none."""
        if arrangement.prefill is None or arrangement.decode is None:
            return math.inf
        ends = min(arrangement.prefill.gpus, arrangement.decode.gpus) * arrangement.units
        return ends * self.bytes_s / self.kv_bytes if self.kv_bytes else math.inf

    def transfer_s(self, arrangement: Arrangement) -> float:
        """Seconds that a mean request's KV takes from one worker to another, with the links to itself."""
        if arrangement.prefill is None or arrangement.decode is None:
            return 0.0
        ends = min(arrangement.prefill.parallel.gpus, arrangement.decode.parallel.gpus)
        return self.kv_bytes / (ends * self.bytes_s)


def replicas(rate_rps: float, prefill_rps: float, decode_rps: float) -> tuple[int, int]:
    """DistServe's last step: workers of each phase that carry `rate_rps`."""
    return max(1, math.ceil(rate_rps / prefill_rps - 1e-9)), max(1, math.ceil(rate_rps / decode_rps - 1e-9))


def high_affinity(
    gpus: int,
    prefill: Mapping[Parallel, float],
    decode: Mapping[Parallel, float],
    links: Links,
    *,
    keep: int,
    goal: Goal = "cluster",
) -> list[Candidate]:
    """Algorithm 1: any counts of any pair of parallelisms on `gpus` GPUs. `prefill[p]`, `decode[p]`: requests a second
    of one worker of that phase and parallelism, judged alone. At most `keep`, best first, and for each pair of
    parallelisms its best counts only."""
    best = [
        candidate
        for prefill_parallel, prefill_rps in prefill.items()
        for decode_parallel, decode_rps in decode.items()
        if (candidate := _fitted(gpus, 1, (prefill_parallel, prefill_rps), (decode_parallel, decode_rps), links, goal))
    ]
    return _leading(best, keep, goal)


def low_affinity(
    gpus: int,
    gpus_per_node: int,
    prefill: Mapping[Parallel, float],
    decode: Mapping[Parallel, float],
    links: Links,
    *,
    keep: int,
    goal: Goal = "cluster",
) -> list[Candidate]:
    """Algorithm 2: units of both pools that fit into one node, so that KV never leaves it, the same on every node.
    DistServe's unit is one worker of each phase; here it may have more of either, as their rates demand."""
    unit_gpus, nodes = min(gpus, gpus_per_node), max(1, gpus // gpus_per_node)
    best = [
        candidate
        for prefill_parallel, prefill_rps in prefill.items()
        for decode_parallel, decode_rps in decode.items()
        if (
            candidate := _fitted(
                unit_gpus, nodes, (prefill_parallel, prefill_rps), (decode_parallel, decode_rps), links, goal
            )
        )
    ]
    return _leading(best, keep, goal)


def colocated(
    gpus: int, gpus_per_node: int, rates: Mapping[tuple[Parallel, int | None], float], *, keep: int
) -> list[Candidate]:
    """The other answer: every worker does both. `rates[parallel, chunk]`: requests a second of one worker. Best
    first."""
    candidates = []
    for (parallel, chunk_tokens), rate_rps in rates.items():
        count = _workers_that_fit(gpus, gpus_per_node, parallel)
        if count:
            arrangement = Arrangement(colocated=Pool(parallel, count), chunk_tokens=chunk_tokens)
            candidates.append(Candidate(arrangement, count * rate_rps))
    return _leading(candidates, keep, "cluster")


def _fitted(
    gpus: int, nodes: int, prefill: tuple[Parallel, float], decode: tuple[Parallel, float], links: Links, goal: Goal
) -> Candidate | None:
    """The best counts of one pair of parallelisms within `gpus` GPUs, the same on each of `nodes`."""
    best: Candidate | None = None
    for decodes in range(1, gpus // decode[0].gpus + 1):
        room = (gpus - decodes * decode[0].gpus) // prefill[0].gpus
        if room < 1:
            break
        # A worker fewer than would keep the decode workers busy, or one that is busy in part: nothing else can be best.
        matching = decodes * decode[1] / prefill[1]
        for prefills in {min(room, max(1, math.floor(matching))), min(room, max(1, math.ceil(matching)))}:
            unit = Arrangement(Pool(prefill[0], prefills), Pool(decode[0], decodes), units=nodes)
            phases_rps = nodes * min(prefills * prefill[1], decodes * decode[1])
            candidate = Candidate(unit, min(phases_rps, links.capacity_rps(unit)))
            if best is None or candidate.merit(goal) > best.merit(goal):
                best = candidate
    return best


def _workers_that_fit(gpus: int, gpus_per_node: int, parallel: Parallel) -> int:
    """Workers of one pool: within a node their tensor ranks stay together; larger ones take whole nodes."""
    if parallel.gpus >= gpus_per_node:
        return gpus // parallel.gpus
    return (gpus // gpus_per_node) * (gpus_per_node // parallel.gpus) + (gpus % gpus_per_node) // parallel.gpus


def _leading(candidates: Sequence[Candidate], keep: int, goal: Goal) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: (candidate.merit(goal), candidate.arrangement.label), reverse=True)[
        :keep
    ]
