"""What tests of every implementation of `kernels/ops.py` share: the accuracy rule, and a paged cache full of NaN."""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels import reference
from kernels.attention_batch import AttentionBatch, build_attention_batch
from kernels.attention_variant import AttentionVariant
from kernels.ops import Ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
NAN = float("nan")

# First position, new tokens, block ids.
Rows = list[tuple[int, int, list[int]]]


def assert_at_most_twice_the_error(got: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor) -> None:
    """The last rounding alone may cost one unit in the last place of the largest value: that much is always allowed."""
    got = got.cpu()
    assert got.dtype == same_dtype.dtype
    assert got.shape == truth.shape
    assert torch.isfinite(got).all()
    assert truth.dtype == torch.float64
    rounding = torch.finfo(got.dtype).eps * truth.abs().max().item()
    error = (got.double() - truth).abs().max().item()
    assert error <= 2 * (same_dtype.double() - truth).abs().max().item() + rounding


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Cache:
    """One layer's cache full of NaN, and blocks of it in shuffled order. `dtype` may be float8_e4m3fn."""

    def __init__(self, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, num_blocks: int = 64) -> None:
        self.kv = torch.full((num_blocks, 2, block_size, kv_heads, head_dim), NAN, dtype=torch.float32).to(dtype)
        # A fixed shuffle: neighbours in a table are no neighbours in memory.
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()

    def take(self, tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-tokens // self.kv.shape[2]))]

    def fill(self, batch: AttentionBatch) -> None:
        """Writes every row's context, and nothing else: the rest stays NaN."""
        _, _, block_size, kv_heads, head_dim = self.kv.shape
        for row, span in enumerate(batch.spans):
            table = batch.block_tables[row].tolist()
            for first in range(0, span.context, block_size):
                block, count = table[first // block_size], min(block_size, span.context - first)
                # Seeded by the place in memory: rows that share a block agree on what it holds.
                values = randn(2, block_size, kv_heads, head_dim, dtype=torch.float32, seed=block)
                self.kv[block, :, :count] = values[:, :count].to(self.kv.dtype)


def check_attention(
    ops: Ops,
    cache: Cache,
    rows: Rows,
    heads: int,
    variant: AttentionVariant | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    padding_rows: int = 0,
) -> None:
    """Holds `ops.paged_attention` to the accuracy rule. `dtype` of q: the cache's unless that is float8.

    `padding_rows` rows of one token and context 0 follow the real ones, and must come out as 0 and -inf.
    """
    _, _, block_size, _, head_dim = cache.kv.shape
    variant = variant or AttentionVariant(head_dim**-0.5)
    batch = build_attention_batch(rows, block_size, CPU)
    dtype = dtype or cache.kv.dtype
    cache.fill(batch)
    tokens = len(batch.positions)
    q = randn(tokens + padding_rows, heads, head_dim, dtype=dtype, seed=1001) * 2
    same = reference.paged_attention(q[:tokens], cache.kv, batch, variant)
    truth = reference.paged_attention(q[:tokens].double(), cache.kv.double(), batch, variant)
    there = build_attention_batch([*rows, *([(-1, 1, [])] * padding_rows)], block_size, device)
    if variant.sink_logits is not None:
        variant = replace(variant, sink_logits=variant.sink_logits.to(device))
    output, lse = ops.paged_attention(q.to(device), cache.kv.to(device), there, variant)
    assert output.is_contiguous()
    assert lse.dtype == torch.float32
    assert_at_most_twice_the_error(output[:tokens], same[0], truth[0])
    assert_at_most_twice_the_error(lse[:tokens], same[1], truth[1])
    assert (output[tokens:] == 0).all()
    assert lse[tokens:].isneginf().all()
