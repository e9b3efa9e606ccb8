"""The whole operation: batches of decode rows, of prefill rows, of both and of padding, by the accuracy rule."""

from __future__ import annotations

import random
from typing import cast

import pytest
import torch

from kernels.attention_batch import build_attention_batch
from kernels.attention_variant import AttentionVariant
from kernels.ops import Ops
from tests.kernels.checks import CPU, DTYPES, Cache, check_attention, randn


def paged() -> Ops:
    from kernels.gpu import paged_attention

    return cast(Ops, paged_attention)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("spans", [[(0, 1), (20, 1)], [(0, 5), (13, 7)], [(0, 5), (9, 1), (0, 1), (13, 7), (40, 1)]])
def test_batches_of_each_kind_of_row_and_of_both(
    device: torch.device, spans: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    cache = Cache(16, 3, 16, dtype)
    rows = [(start, count, cache.take(start + count)) for start, count in spans]
    q_dtype = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    check_attention(paged(), cache, rows, 9, dtype=q_dtype, device=device, padding_rows=2)


@pytest.mark.parametrize("seed", range(4))
def test_ragged_batches_with_all_variants_at_once(device: torch.device, seed: int) -> None:
    """Both kernels mean the same by a variant."""
    rng = random.Random(seed)
    cache = Cache(rng.choice([16, 32]), 2, 32, rng.choice(DTYPES), num_blocks=100)
    shared = cache.take(64)
    rows = []
    for _ in range(4):
        start, count = rng.randrange(64, 130), rng.choice([1, 1, 2, 9])
        rows.append((start, count, shared + cache.take(start + count - 64)))
    sink_logits = randn(4, dtype=torch.float32, seed=seed)
    variant = AttentionVariant(0.18, rng.choice([7, 40]), rng.choice([2.0, 50.0]), rng.choice([0, 19]), sink_logits)
    check_attention(paged(), cache, rows, 4, variant, device=device, padding_rows=1)


def test_only_padding(device: torch.device) -> None:
    batch = build_attention_batch([(-1, 1, [])] * 3, 16, device)
    kv = torch.full((2, 2, 16, 1, 16), float("nan"), device=device)
    output, lse = paged().paged_attention(torch.ones(3, 2, 16, device=device), kv, batch, AttentionVariant(1.0))
    assert (output == 0).all()
    assert lse.isneginf().all()


def test_later_layers_use_the_first_ones_plan(device: torch.device) -> None:
    """What is derived from a batch is derived once; a layer's variant is no part of it."""
    cache = Cache(16, 1, 16, torch.float32)
    rows = [(0, 5, cache.take(5)), (20, 1, cache.take(21)), (30, 3, cache.take(33))]
    cache.fill(build_attention_batch(rows, 16, CPU))
    batch = build_attention_batch(rows, 16, device)
    q, kv = randn(9, 2, 16, dtype=torch.float32).to(device), cache.kv.to(device)
    first = paged().paged_attention(q, kv, batch, AttentionVariant(0.25))
    plans = dict(batch.plans)
    windowed = paged().paged_attention(q, kv, batch, AttentionVariant(0.25, window=4))
    again = paged().paged_attention(q, kv, batch, AttentionVariant(0.25))
    assert {key: id(plan) for key, plan in batch.plans.items()} == {key: id(plan) for key, plan in plans.items()}
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], windowed[0])


def test_results_are_fresh_and_inputs_stay(device: torch.device) -> None:
    cache = Cache(16, 1, 16, torch.float32)
    rows = [(0, 5, cache.take(5)), (20, 1, cache.take(21))]
    cache.fill(build_attention_batch(rows, 16, CPU))
    batch = build_attention_batch(rows, 16, device)
    q, kv = randn(6, 2, 16, dtype=torch.float32).to(device), cache.kv.to(device)
    before_q, before_kv = q.clone(), kv.clone()
    first = paged().paged_attention(q, kv, batch, AttentionVariant(0.25))
    kept = first[0].clone()
    paged().paged_attention(q * 2, kv, batch, AttentionVariant(0.25))
    assert torch.equal(first[0], kept)
    assert torch.equal(q, before_q)
    assert torch.equal(kv.nan_to_num(7.0), before_kv.nan_to_num(7.0))
