"""What work costs at one worker, in seconds: asked of a cost model, or of what the worker measured of itself.

Both forms answer the same questions, so that predictions have one code path. A cost model's answers are corrected by
the scales that the worker has refitted from its own steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cluster.gateway_config import RouterConfig
from cluster.routing.cost_table import CostTable
from engine.stats import LoopStats
from engine.step_cost import StepWork


class CostLike(Protocol):
    """What the router asks of a cost model (cluster/planning/cost_model.py)."""

    @property
    def saturation_tokens(self) -> int: ...

    def step_s(self, work: StepWork) -> float: ...

    def decode_s(self, rows: int, context_tokens: int) -> float: ...

    def kv_bytes(self, tokens: int) -> int: ...


@dataclass(frozen=True, slots=True)
class RoleCosts:
    """One cost model for each role, where they differ in parallelism or device."""

    prefill: CostLike
    decode: CostLike


class WorkerCosts(Protocol):
    """Seconds at a worker that reports `stats`."""

    @property
    def knows_mixed_steps(self) -> bool:
        """Whether the cost of a prompt among decode rows can be told from that of a prompt alone."""
        ...

    def prefill_s(self, stats: LoopStats, new_tokens: int, cached_tokens: int) -> float:
        """A prompt's uncached tokens on a prefill worker, alone."""
        ...

    def decode_s(self, stats: LoopStats, rows: float, context_tokens: float) -> float:
        """One decode step."""
        ...

    def local_s(self, stats: LoopStats, new_tokens: int, cached_tokens: int) -> float:
        """What a prompt adds to the steps of a decode worker that computes it."""
        ...

    def local_steps(self, new_tokens: int) -> int:
        """The number of decode steps over which that is spread."""
        ...

    def queued_s(self, stats: LoopStats) -> float:
        """What the reported queue of prompt tokens takes."""
        ...

    def kv_bytes(self, tokens: int) -> int: ...


class ModelCosts:
    """Implements WorkerCosts by cost models. A prefill worker computes a prompt in steps of `prefill_chunk_tokens`, a
    decode worker in steps of `local_chunk_tokens`; None for where the model says that larger steps gain nothing."""

    def __init__(
        self, costs: RoleCosts, prefill_chunk_tokens: int | None = None, local_chunk_tokens: int | None = None
    ) -> None:
        self._costs = costs
        self._prefill_chunk = prefill_chunk_tokens or costs.prefill.saturation_tokens
        self._local_chunk = local_chunk_tokens or costs.decode.saturation_tokens
        self._prefill_step_s = CostTable(partial(_prompt_step_s, costs.prefill), is_coarse=True)
        self._local_step_s = CostTable(partial(_prompt_step_s, costs.decode), is_coarse=True)
        self._decode_step_s = CostTable(costs.decode.decode_s, is_coarse=False)
        self._least_step_s = costs.decode.decode_s(1, 1)

    @property
    def knows_mixed_steps(self) -> bool:
        return True

    def prefill_s(self, stats: LoopStats, new_tokens: int, cached_tokens: int) -> float:
        steps_s = _chunks_s(self._prefill_step_s, new_tokens, cached_tokens, self._prefill_chunk)
        return steps_s * stats.prefill_scale

    def decode_s(self, stats: LoopStats, rows: float, context_tokens: float) -> float:
        return self._decode_step_s(max(1, round(rows)), context_tokens) * stats.decode_scale

    def local_s(self, stats: LoopStats, new_tokens: int, cached_tokens: int) -> float:
        alone_s = _chunks_s(self._local_step_s, new_tokens, cached_tokens, self._local_chunk)
        return riding_s(alone_s, self.local_steps(new_tokens), self._least_step_s) * stats.prefill_scale

    def local_steps(self, new_tokens: int) -> int:
        return -(-new_tokens // self._local_chunk)

    def queued_s(self, stats: LoopStats) -> float:
        if stats.queued_s > 0 or stats.queued_tokens == 0:
            return stats.queued_s
        return self.prefill_s(stats, stats.queued_tokens, 0)

    def kv_bytes(self, tokens: int) -> int:
        return self._costs.prefill.kv_bytes(tokens)


class MeasuredCosts:
    """Implements WorkerCosts by the rates in the reports, and by configured guesses before the first."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config

    @property
    def knows_mixed_steps(self) -> bool:
        return False

    def prefill_s(self, stats: LoopStats, new_tokens: int, cached_tokens: int) -> float:
        return new_tokens / (stats.prefill_tokens_per_s or self._config.default_prefill_tokens_per_s)

    def decode_s(self, stats: LoopStats, rows: float, context_tokens: float) -> float:
        # A step reads the KV of all that run: it grows with what is held.
        step_s = stats.decode_step_s or self._config.default_decode_step_s
        return step_s * (1.0 + context_tokens / (stats.blocks_total * stats.block_size))

    def local_s(self, stats: LoopStats, new_tokens: int, cached_tokens: int) -> float:
        return self.prefill_s(stats, new_tokens, cached_tokens)

    def local_steps(self, new_tokens: int) -> int:
        return 1

    def queued_s(self, stats: LoopStats) -> float:
        return stats.queued_s or self.prefill_s(stats, stats.queued_tokens, 0)

    def kv_bytes(self, tokens: int) -> int:
        return 0


def worker_costs(cost: CostLike | RoleCosts | None, config: RouterConfig) -> WorkerCosts:
    """The costs of a cluster whose workers share one cost model, have one per role, or none at all."""
    if cost is None:
        return MeasuredCosts(config)
    costs = cost if isinstance(cost, RoleCosts) else RoleCosts(cost, cost)
    return ModelCosts(costs, config.prefill_chunk_tokens, config.local_chunk_tokens)


def _prompt_step_s(cost: CostLike, new_tokens: int, context_tokens: int) -> float:
    return cost.step_s(StepWork(((new_tokens, context_tokens),))) if new_tokens else 0.0


def riding_s(alone_s: float, steps: int, least_step_s: float) -> float:
    """What a prompt of `alone_s` adds to `steps` decode steps. Its tokens ride on steps that read the weights anyway;
    what is fixed in a step, `least_step_s`, is not paid again."""
    return max(0.5 * alone_s, alone_s - steps * least_step_s)


def _chunks_s(step_s: CostTable, new_tokens: int, cached_tokens: int, chunk_tokens: int) -> float:
    """A prompt in equal chunks and a rest. A step's time is close to linear in the context before it, so all full
    chunks together take what so many of the middle one take."""
    full, rest = divmod(new_tokens, chunk_tokens)
    seconds = 0.0
    if full:
        seconds = full * step_s(chunk_tokens, cached_tokens + 0.5 * (full - 1) * chunk_tokens)
    if rest:
        seconds += step_s(rest, cached_tokens + full * chunk_tokens)
    return seconds
