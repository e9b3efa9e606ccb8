"""What is to be emulated: which workers, of what device and model, under which policies, for which objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cluster.controller_config import ControllerConfig
from cluster.gateway_config import GatewayConfig
from decode_worker.config import DecodeConfig
from engine.errors import ConfigError
from engine.objectives import NO_OBJECTIVES, Objectives
from engine.step_cost import StepCost
from prefill_worker.config import PrefillConfig


class WorkerCost(StepCost, Protocol):
    """What the emulator must know of one worker: its steps, its memory, and how many GPUs it takes.

    cluster/planning/cost_model.py has it; so may whoever brings a cost model of their own.
    """

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of KV that the worker's memory holds beside the weights."""
        ...

    @property
    def gpus(self) -> int: ...

    def prefill_s(self, new_tokens: int, context: int = 0, chunk_tokens: int | None = None) -> float:
        """Seconds of a prompt alone, in steps of `chunk_tokens`."""
        ...

    def decode_s(self, rows: int, context_tokens: int) -> float:
        """Seconds of one decode step."""
        ...

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the KV of `tokens` tokens, all layers and ranks together."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulationSpec:
    """A cluster on paper: `prefill` + `decode` disaggregated workers, and `colocated` ones that do both.

    The cost models are built from `profile` and `model` by cluster/planning/cost_model.py, unless `prefill_cost` or
    `decode_cost` bring them ready-made; a colocated worker is a decode worker, and has its parallelism and cost.
    `link_bytes_s` is what one GPU can send to another worker, None for what the profile says of its network; without a
    profile transfers then take no time.

    `deadline_factor`: a client gives up after so many times its objectives, TTFT + (output tokens − 1) · TPOT, but not
    before `min_deadline_s`. Who gives up has missed.

    `block_size` trades exactness of the prefix cache and of memory for speed: 16 is what workers have by default.
    `prefill_noise`, `decode_noise`: ratios of actual over predicted step times, one drawn for each step; () for none,
    None for those that a measured profile brings along.
    `asked_tokens`: max_tokens of every request, None for the longest answer of the trace; where an answer really ends
    is not known to the cluster before. `controller` None: roles stay as they are.
    The three configs replace what the emulator would derive from the cost models, `router` apart.
    """

    profile: str = ""
    model: str = ""
    prefill: int = 0
    decode: int = 0
    colocated: int = 0
    tp_prefill: int = 1
    pp_prefill: int = 1
    tp_decode: int = 1
    pp_decode: int = 1
    router: str = "goodput"
    objectives: Objectives = NO_OBJECTIVES
    seed: int = 0
    controller: ControllerConfig | None = None
    asked_tokens: int | None = None
    prefill_cost: WorkerCost | None = None
    decode_cost: WorkerCost | None = None
    link_bytes_s: float | None = None
    link_latency_s: float = 1e-4
    block_size: int = 16
    prefix_cache: bool = True
    deadline_factor: float = 10.0
    min_deadline_s: float = 30.0
    prefill_noise: tuple[float, ...] | None = None
    decode_noise: tuple[float, ...] | None = None
    prefill_config: PrefillConfig | None = None
    decode_config: DecodeConfig | None = None
    gateway_config: GatewayConfig | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError naming the field for a cluster that could not answer anything."""
        for name in ("prefill", "decode", "colocated"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected 0 or more workers")
        if self.decode + self.colocated == 0:
            raise ConfigError("decode: got 0, expected at least 1 worker that decodes, or 1 colocated")
        if self.prefill + self.colocated == 0:
            raise ConfigError("prefill: got 0, expected at least 1 worker that prefills, or 1 colocated")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size: got {self.block_size}, expected a power of two")
        self.objectives.validate()

    def deadline_s(self, output_tokens: int) -> float | None:
        """Seconds from its arrival after which a client of so many tokens gives up. None without objectives: never."""
        ttft_s, tpot_s = self.objectives.ttft_s, self.objectives.tpot_s
        if ttft_s is None or tpot_s is None:
            return None
        return max(self.min_deadline_s, self.deadline_factor * (ttft_s + max(0, output_tokens - 1) * tpot_s))
