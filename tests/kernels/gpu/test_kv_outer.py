"""The benchmark's other order of loops: the same result, by the accuracy rule."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.attention_batch import build_attention_batch
from kernels.attention_variant import AttentionVariant
from tests.kernels.checks import CPU, assert_at_most_twice_the_error, randn


@pytest.mark.parametrize(
    ("tokens", "tile_queries", "tile_keys", "dtype"),
    [
        (1, 16, 16, torch.float32),
        (16, 16, 16, torch.float16),
        (37, 16, 16, torch.bfloat16),
        (70, 32, 16, torch.float32),
        (70, 16, 32, torch.float16),
        (70, 32, 32, torch.bfloat16),
    ],
)
def test_keys_outside_queries_inside(
    device: torch.device, tokens: int, tile_queries: int, tile_keys: int, dtype: torch.dtype
) -> None:
    from bench.kv_outer_attention import kv_outer_attention

    sequences, heads, kv_heads, head_dim = 2, 2, 1, 32
    q = randn(sequences, heads, tokens, head_dim, dtype=dtype, seed=1) * 2
    k, v = (randn(sequences, kv_heads, tokens, head_dim, dtype=dtype, seed=seed) for seed in (2, 3))
    # One block is one sequence.
    kv = torch.stack((k, v), dim=1).transpose(2, 3).contiguous()
    batch = build_attention_batch([(0, tokens, [0]), (0, tokens, [1])], tokens, CPU)
    flat, variant = q.transpose(1, 2).reshape(-1, heads, head_dim), AttentionVariant(head_dim**-0.5)
    same = reference.paged_attention(flat, kv, batch, variant)
    truth = reference.paged_attention(flat.double(), kv.double(), batch, variant)
    there = (x.to(device) for x in (q, k, v))
    output, lse = kv_outer_attention(*there, variant.scale, tile_queries, tile_keys)
    assert_at_most_twice_the_error(output.transpose(1, 2).reshape(flat.shape), same[0], truth[0])
    assert_at_most_twice_the_error(lse.transpose(1, 2).reshape(-1, heads), same[1], truth[1])
