"""How the GPUs of a cluster are used: which parallelism, how many workers, of which role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["disaggregated", "colocated"]


@dataclass(frozen=True, slots=True, order=True)
class Parallel:
    """One worker's ranks: `tp` tensor-parallel ones in each of `pp` pipeline stages."""

    tp: int = 1
    pp: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp{self.tp}" + (f" pp{self.pp}" if self.pp > 1 else "")


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal workers of one role."""

    parallel: Parallel
    count: int

    @property
    def gpus(self) -> int:
        return self.parallel.gpus * self.count


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Pools of one unit, and how many such units there are: `units` > 1 when the pools of a node repeat on every node.

    Disaggregated: `prefill` and `decode`. Colocated: `colocated` alone, whose workers compute prompts in chunks of at
    most `chunk_tokens` beside their decode rows; None for whole prompts, as engines did before chunking.
    """

    prefill: Pool | None = None
    decode: Pool | None = None
    colocated: Pool | None = None
    chunk_tokens: int | None = None
    units: int = 1

    def __post_init__(self) -> None:
        is_pair = self.prefill is not None and self.decode is not None and self.colocated is None
        is_single = self.prefill is None and self.decode is None and self.colocated is not None
        assert is_pair or is_single, f"an arrangement is prefill and decode, or colocated: {self}"
        assert self.units >= 1

    @property
    def kind(self) -> Kind:
        return "disaggregated" if self.colocated is None else "colocated"

    @property
    def unit_gpus(self) -> int:
        return sum(pool.gpus for pool in (self.prefill, self.decode, self.colocated) if pool is not None)

    @property
    def gpus(self) -> int:
        return self.unit_gpus * self.units

    @property
    def label(self) -> str:
        """Short and unique: "9P tp1 + 7D tp1", "16C tp1, chunks 512"."""
        if self.colocated is not None:
            chunks = "whole prompts" if self.chunk_tokens is None else f"chunks {self.chunk_tokens}"
            return f"{self.colocated.count * self.units}C {self.colocated.parallel}, {chunks}"
        assert self.prefill is not None
        assert self.decode is not None
        unit = f"{self.prefill.count}P {self.prefill.parallel} + {self.decode.count}D {self.decode.parallel}"
        return unit if self.units == 1 else f"{self.units} x ({unit})"

    def __str__(self) -> str:
        return self.label
