"""What a planner tries: ways to split a model over GPUs, and prompt chunks of a colocated worker."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.planning.arrangement import Parallel
from cluster.planning.bounds import Lengths, PlanCost
from engine.step_cost import StepWork

# The chunk sizes that suggest themselves to colocated workers: powers of two in this range, and whole prompts.
SMALLEST_CHUNK, LARGEST_CHUNK = 128, 8192


def splits(gpus: int, most_ranks: int) -> list[Parallel]:
    """Powers of two: tensor ranks within a node, then stages of them; the fewest GPUs first."""
    ranks = [1 << power for power in range(most_ranks.bit_length()) if 1 << power <= min(gpus, most_ranks)]
    stages = [1 << power for power in range(gpus.bit_length())]
    found = [Parallel(tp, pp) for pp in stages for tp in ranks if tp * pp <= gpus]
    return sorted(found, key=lambda parallel: (parallel.pp, parallel.tp))


def chunk_sizes(cost: PlanCost, lengths: Lengths, tpot_s: float) -> list[int | None]:
    """Chunks worth trying on a colocated worker: the largest beside which a step still keeps TPOT, the one that
    saturates the GPU, and whole prompts, which let TPOT's mean bear a long step now and then."""
    context = round(lengths.mean_kv + lengths.mean_output / 2)
    rows = max(1, min(64, cost.kv_capacity_tokens // max(1, context)))
    sizes = [1 << power for power in range(SMALLEST_CHUNK.bit_length() - 1, LARGEST_CHUNK.bit_length())]
    kept = [size for size in sizes if cost.step_s(StepWork(((size, 0),), rows, rows * context)) <= tpot_s]
    saturating = next((size for size in sizes if size >= cost.saturation_tokens), sizes[-1])
    chosen: Iterable[int] = {kept[-1] if kept else sizes[0], saturating}
    return [*sorted(chosen), None]
