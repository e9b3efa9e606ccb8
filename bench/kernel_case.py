"""What bench/kernels.py measures: one operation at one shape, ours and its peers'; and the shapes of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from kernels.attention_variant import AttentionVariant

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """`moved` bytes and `flops` are what the operation cannot do without; each peer computes the same."""

    name: str
    ours: Work
    moved: int
    flops: int = 0
    peers: dict[str, Work] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Those of Llama-3.1-8B, and the device and dtype to measure on. `scale` divides batches and contexts, for a smoke
    test where no GPU is."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    vocab: int = 128_256
    block_size: int = 16
    scale: int = 1

    @property
    def variant(self) -> AttentionVariant:
        return AttentionVariant(self.head_dim**-0.5)

    def scaled(self, count: int) -> int:
        return max(1, count // self.scale)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def smoke_sizes(device: torch.device) -> Sizes:
    """Small enough for Triton's interpreter."""
    return replace(
        Sizes(device, torch.float32),
        heads=4,
        kv_heads=2,
        head_dim=16,
        hidden=32,
        intermediate=64,
        layers=2,
        vocab=1000,
        scale=128,
    )
