"""The Triton rotation and store: error to float64 at most twice that of the reference in the same dtype, and not a
byte outside the given slots."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.gpu.rope_store import rope_store
from tests.kernels.checks import DTYPES, Cache, assert_at_most_twice_the_error, randn

MAX_CONTEXT = 300
FP8 = torch.float8_e4m3fn


def rope_table(head_dim: int) -> torch.Tensor:
    angles = torch.arange(MAX_CONTEXT, dtype=torch.float64)[:, None] * 100.0 ** -torch.linspace(0, 1, head_dim // 2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def check(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    cache_dtype: torch.dtype | None = None,
    block_size: int = 16,
) -> None:
    """Slots in shuffled blocks, every third token padding; q, k and v as views into one projection."""
    cache = Cache(block_size, kv_heads, head_dim, cache_dtype or dtype, num_blocks=8)
    order = torch.randperm(8 * block_size, generator=torch.Generator().manual_seed(5))
    slots = torch.tensor([-1 if token % 3 == 2 else int(order[token]) for token in range(tokens)])
    positions = torch.tensor([299, 0, 7, 7, 123, 64, 255])[torch.arange(tokens) % 7]
    table = rope_table(head_dim)
    fused = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    shares = (heads, kv_heads, kv_heads)
    q, k, v = fused.split(shares, 1)

    there = cache.kv.to(device)
    views = fused.to(device).split(shares, 1)
    got = rope_store(*views, positions.to(device), table.to(device), there, slots.to(device))
    same_kv, true_kv = cache.kv.clone(), cache.kv.double()
    same = reference.rope_store(q, k, v, positions, table, same_kv, slots)
    truth = reference.rope_store(q.double(), k.double(), v.double(), positions, table.double(), true_kv, slots)

    assert got.is_contiguous()
    assert_at_most_twice_the_error(got, same, truth)
    got_kv = there.cpu().double()
    is_written = ~same_kv.double().isnan()
    assert torch.equal(~got_kv.isnan(), is_written), "wrote outside the slots, or not all of them"
    error, allowed = ((kv[is_written] - true_kv[is_written]).abs().max().item() for kv in (got_kv, same_kv.double()))
    assert error <= 2 * allowed + torch.finfo(cache.kv.dtype).eps * true_kv[is_written].abs().max().item()
    # v is only copied, or cast once.
    assert torch.equal(got_kv[:, 1][is_written[:, 1]], same_kv.double()[:, 1][is_written[:, 1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 22, 64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(5, 8, 2, head_dim, dtype, device)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (32, 8), (16, 16), (17, 17), (16, 1), (40, 8)])
def test_head_counts(heads: int, kv_heads: int, device: torch.device) -> None:
    check(4, heads, kv_heads, 64, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_float8_cache(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(5, 8, 2, head_dim, dtype, device, cache_dtype=FP8)


@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 128])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    check(6, 4, 2, 64, torch.bfloat16, device, block_size=block_size)


def test_a_float8_cache_rounds_as_plain_torch_does(device: torch.device) -> None:
    """To the activations' dtype first, so that caches agree whichever implementation wrote them."""
    k = randn(16, 1, 64, dtype=torch.bfloat16).to(device)
    kv = torch.zeros(1, 2, 16, 1, 64, dtype=FP8, device=device)
    positions = slots = torch.arange(16, device=device)
    rotated = rope_store(k, k, k, positions, rope_table(64).to(device), kv, slots)
    stored = kv[0, 0]
    assert torch.equal(stored.float(), rotated.to(FP8).float())


def test_all_tokens_are_padding(device: torch.device) -> None:
    q = randn(2, 4, 64, dtype=torch.bfloat16).to(device)
    kv = torch.full((2, 2, 16, 2, 64), 7.0, dtype=torch.bfloat16, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    got = rope_store(q, q[:, :2], q[:, 2:], zeros, rope_table(64).to(device), kv, zeros - 1)
    assert (kv == 7).all()
    # Position 0 turns nothing.
    assert torch.equal(got, q)


def test_no_tokens(device: torch.device) -> None:
    q = torch.empty(0, 4, 64, dtype=torch.bfloat16, device=device)
    kv = torch.zeros(2, 2, 16, 2, 64, dtype=torch.bfloat16, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert rope_store(q, q[:, :2], q[:, 2:], none, rope_table(64).to(device), kv, none).shape == (0, 4, 64)


def test_slots_beyond_32_bits(device: torch.device) -> None:
    # 2^31 elements and some; memory that nobody touches is only an address range.
    block_size, head_dim = 16, 64
    num_blocks = 2**31 // (2 * block_size * head_dim) + 2
    kv = torch.empty(num_blocks, 2, block_size, 1, head_dim, dtype=FP8, device=device)
    k, v = (randn(2, 1, head_dim, dtype=torch.bfloat16, seed=seed).to(device) for seed in (1, 2))
    slots = torch.tensor([num_blocks * block_size - 1, 3], device=device)
    positions = torch.zeros(2, dtype=torch.int64, device=device)
    rope_store(k, k, v, positions, rope_table(head_dim).to(device), kv, slots)
    for token, (block, place) in enumerate([(num_blocks - 1, block_size - 1), (0, 3)]):
        assert torch.equal(kv[block, 0, place].float(), k[token].to(FP8).float())
        assert torch.equal(kv[block, 1, place].float(), v[token].to(FP8).float())
