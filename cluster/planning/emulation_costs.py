"""The cost models of an emulated cluster's workers, and the links between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cluster.planning.cost_model import CostModel, cost_model
from cluster.planning.emulation_spec import EmulationSpec, WorkerCost
from engine.errors import ConfigError

# What ready-made costs are called, and how long a request they bear, where they do not say.
READY_MADE = "ready-made"
ANY_CONTEXT = 1 << 30


@dataclass(frozen=True, slots=True)
class EmulationCosts:
    """`decode` is the colocated workers' as well. `gpu_link_bytes_s`: what one GPU can send to another worker."""

    prefill: WorkerCost
    decode: WorkerCost
    model: str
    max_context: int
    gpu_link_bytes_s: float

    def link_bytes_s(self, cost: WorkerCost) -> float:
        """What a worker can send: each of its GPUs has a link of its own."""
        return self.gpu_link_bytes_s * cost.gpus


def costs_of(spec: EmulationSpec) -> EmulationCosts:
    """Raises ConfigError for a profile, model or split that cannot be, and for costs of two different models."""
    prefill = spec.prefill_cost or _built(spec, spec.tp_prefill, spec.pp_prefill)
    decode = spec.decode_cost or _built(spec, spec.tp_decode, spec.pp_decode)
    if prefill.kv_bytes(1) != decode.kv_bytes(1):
        sizes = f"{prefill.kv_bytes(1)} and {decode.kv_bytes(1)} bytes"
        raise ConfigError(f"prefill_cost, decode_cost: a token's KV has {sizes}, expected the same model in both")
    facts = decode.facts.model if isinstance(decode, CostModel) else None
    return EmulationCosts(
        prefill,
        decode,
        model=spec.model or (facts.name if facts is not None else READY_MADE),
        max_context=facts.max_context if facts is not None else ANY_CONTEXT,
        gpu_link_bytes_s=_link_bytes_s(spec, prefill),
    )


def loop_s_of(cost: WorkerCost) -> Callable[[int], float] | None:
    """Seconds that the worker's own loop adds to a step, where the cost model knows of them."""
    return cost.loop_s if isinstance(cost, CostModel) else None


def own_copy(cost: WorkerCost) -> WorkerCost:
    """A worker's own: it learns from its steps alone, and the truth that steps are made of stays as it is."""
    return cost.with_scales(*cost.scales) if isinstance(cost, CostModel) else cost


def _link_bytes_s(spec: EmulationSpec, prefill: WorkerCost) -> float:
    if spec.link_bytes_s is not None:
        return spec.link_bytes_s
    known = prefill.link_bytes_s if isinstance(prefill, CostModel) else None
    return math.inf if known is None else known


def _built(spec: EmulationSpec, tp: int, pp: int) -> CostModel:
    for name in ("profile", "model"):
        if not getattr(spec, name):
            raise ConfigError(f"{name}: got '', expected a name or a path, or prefill_cost and decode_cost ready-made")
    return cost_model(spec.profile, spec.model, tp=tp, pp=pp)


def noise_of(spec: EmulationSpec, cost: WorkerCost) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Ratios of actual over predicted seconds: steps with prompts, and others. The spec's, or what was measured."""
    measured = (cost.prefill_noise, cost.decode_noise) if isinstance(cost, CostModel) else ((), ())
    return (
        measured[0] if spec.prefill_noise is None else spec.prefill_noise,
        measured[1] if spec.decode_noise is None else spec.decode_noise,
    )
