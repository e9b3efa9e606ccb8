"""Every operation against its reference: error to float64 at most twice the reference's own in the same dtype."""

from __future__ import annotations

import pytest
import torch

from kernels import ops, reference
from kernels.attention_batch import AttentionBatch, build_attention_batch
from kernels.paged_attention import attend_math, merge

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def assert_at_most_twice_the_error(got: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor) -> None:
    """The last rounding alone may cost one unit in the last place of the largest value: that much is always allowed."""
    assert got.dtype == same_dtype.dtype
    assert got.shape == truth.shape
    assert torch.isfinite(got).all()
    assert truth.dtype == torch.float64
    rounding = torch.finfo(got.dtype).eps * truth.abs().max().item()
    error = (got.double() - truth).abs().max().item()
    assert error <= 2 * (same_dtype.double() - truth).abs().max().item() + rounding


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (5, 123), (7, 3, 22), (33, 576)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    residual = randn(*shape, dtype=dtype, seed=2) if with_residual else None
    before = x.clone()
    got = ops.rms_norm(x, weight, 1e-5, residual)
    same = reference.rms_norm(x, weight, 1e-5, residual)
    truth = reference.rms_norm(x.double(), weight.double(), 1e-5, None if residual is None else residual.double())
    for index in range(2):
        assert_at_most_twice_the_error(got[index], same[index], truth[index])
    assert torch.equal(x, before), "the input is the caller's"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 1, 1, 2), (5, 9, 3, 64), (3, 8, 1, 22)])
def test_rope(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    angles = torch.arange(300, dtype=torch.float64)[:, None] * 100.0 ** -torch.linspace(0, 1, head_dim // 2)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.tensor([299, 0, 7, 7, 123])[:tokens]
    # Views into one tensor, as the model passes them.
    both = randn(tokens, heads + kv_heads, head_dim, dtype=dtype)
    q, k = both[:, :heads], both[:, heads:]
    got = ops.rope(q, k, positions, table.float())
    same = reference.rope(q, k, positions, table.float())
    truth = reference.rope(q.double(), k.double(), positions, table.float().double())
    for index in range(2):
        assert_at_most_twice_the_error(got[index], same[index], truth[index])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 246), (33, 3072)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype) * 4
    assert_at_most_twice_the_error(ops.silu_mul(x), reference.silu_mul(x), reference.silu_mul(x.double()))


class Cache:
    """One layer's cache full of NaN, and rows whose past has been written into blocks that no one else uses."""

    def __init__(self, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, num_blocks: int = 64) -> None:
        self.kv = torch.full((num_blocks, 2, block_size, kv_heads, head_dim), NAN, dtype=dtype)
        # A fixed shuffle: neighbours in a table are no neighbours in memory.
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()

    def take(self, tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-tokens // self.kv.shape[2]))]

    def fill(self, batch: AttentionBatch, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes every row's past, and the new tokens' k and v."""
        _, _, block_size, kv_heads, head_dim = self.kv.shape
        for row, span in enumerate(batch.spans):
            table = batch.block_tables[row].tolist()
            for place in range(span.start):
                # Seeded by the place in memory: rows that share a block agree on what it holds.
                slot = table[place // block_size] * block_size + place % block_size
                past = randn(2, kv_heads, head_dim, dtype=self.kv.dtype, seed=slot)
                self.kv[table[place // block_size], :, place % block_size] = past
        ops.store_kv(k, v, self.kv, batch.slots)


def check_attention(
    cache: Cache, rows: list[tuple[int, int, list[int]]], heads: int, window: int | None = None
) -> None:
    """Rows are (first position, new tokens, block ids)."""
    _, _, block_size, kv_heads, head_dim = cache.kv.shape
    batch = build_attention_batch(rows, block_size, torch.device("cpu"))
    tokens, dtype = len(batch.positions), cache.kv.dtype
    q = randn(tokens, heads, head_dim, dtype=dtype, seed=1001) * 2
    k, v = (randn(tokens, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (1002, 1003))
    cache.fill(batch, k, v)
    scale = head_dim**-0.5
    got = ops.paged_attention(q, k, v, cache.kv, batch, scale, window)
    same = reference.paged_attention(q, k, v, cache.kv, batch, scale, window)
    wide = (q.double(), k.double(), v.double(), cache.kv.double())
    truth = reference.paged_attention(*wide, batch, scale, window)
    for index in range(2):
        assert_at_most_twice_the_error(got[index], same[index], truth[index])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (9, 3), (8, 2), (8, 1)])
def test_decode_rows_of_context_1_exact_block_and_many_blocks(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    cache = Cache(4, kv_heads, 16, dtype)
    check_attention(cache, [(start, 1, cache.take(start + 1)) for start in (0, 2, 3, 4, 7, 30)], heads)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 16, 100])
@pytest.mark.parametrize("start", [0, 1, 4, 7, 17])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_one_row_at_every_alignment(start: int, count: int, window: int | None) -> None:
    cache = Cache(4, 2, 10, torch.float32)
    check_attention(cache, [(start, count, cache.take(start + count))], 6, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("window", [None, 6])
def test_a_ragged_batch_of_both_kinds_of_row(block_size: int, window: int | None, dtype: torch.dtype) -> None:
    cache = Cache(block_size, 3, 22, dtype, num_blocks=160)
    spans = [(0, 5), (9, 1), (0, 1), (13, 7), (40, 1), (16, 16)]
    check_attention(cache, [(start, count, cache.take(start + count)) for start, count in spans], 9, window)


@pytest.mark.parametrize("window", [None, 6])
def test_rows_that_share_their_first_blocks(window: int | None) -> None:
    cache = Cache(4, 1, 8, torch.float32)
    shared = cache.take(12)
    rows = [(start, count, shared + cache.take(start + count - 12)) for start, count in [(12, 1), (14, 6), (19, 1)]]
    check_attention(cache, rows, 4, window)


def test_a_table_longer_than_the_context_is_cut() -> None:
    cache = Cache(4, 1, 8, torch.float32)
    check_attention(cache, [(5, 1, cache.take(40)), (0, 3, cache.take(20))], 2)


def test_the_decode_batch_is_split_only_when_padding_dominates() -> None:
    """The answer is the same either way (above); this pins the rule."""
    cache = Cache(4, 1, 8, torch.float32)
    cpu = torch.device("cpu")
    for starts, groups in (((9, 10, 11), 1), ((0, 0, 0, 0, 60), 2)):
        batch = build_attention_batch([(start, 1, cache.take(start + 1)) for start in starts], 4, cpu)
        q = torch.zeros(len(starts), 2, 8)
        kv = torch.zeros_like(cache.kv)
        ops.paged_attention(q, q[:, :1], q[:, :1], kv, batch, 1.0)
        (plan,) = batch.plans.values()
        assert len(plan.decode) == groups


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_independent_path_agrees(dtype: torch.dtype) -> None:
    q, k, v = (randn(2, 3, tokens, 16, dtype=dtype, seed=tokens) for tokens in (7, 9, 9))
    mask = torch.zeros(7, 9).masked_fill_(randn(7, 9, dtype=torch.float32) > 1, float("-inf"))
    scores = q.double() @ k.double().transpose(-1, -2) * 0.25 + mask
    truth, truth_lse = scores.softmax(-1) @ v.double(), scores.logsumexp(-1)
    got, lse = attend_math(q, k, v, False, mask, 0.25)
    low = ((q @ k.transpose(-1, -2)) * 0.25 + mask.to(dtype)).softmax(-1) @ v
    assert_at_most_twice_the_error(got, low, truth)
    assert (lse.double() - truth_lse).abs().max() <= 4 * torch.finfo(torch.float32).eps * truth_lse.abs().max()
    causal = attend_math(k, k, v, True, None, 0.25)[0]
    hidden = torch.full((9, 9), float("-inf")).triu(1)
    assert torch.equal(causal, attend_math(k, k, v, False, hidden, 0.25)[0])


def test_merging_two_halves_gives_the_whole() -> None:
    q, k, v = (randn(2, tokens, 16, dtype=torch.float64, seed=tokens) for tokens in (5, 12, 12))
    whole = attend_math(q, k, v, False, None, 0.25)
    halves = [attend_math(q, k[:, part], v[:, part], False, None, 0.25) for part in (slice(0, 5), slice(5, 12))]
    for got, expected in zip(merge(halves[0], halves[1]), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 4])
def test_store_kv_writes_its_slots_and_nothing_else(block_size: int) -> None:
    k, v = (randn(3, 2, 6, dtype=torch.float32, seed=seed) for seed in (1, 2))
    got = torch.full((8, 2, block_size, 2, 6), -1.0)
    expected = got.clone()
    slots = torch.tensor([7 * block_size, 0, 3 * block_size + block_size - 1])
    ops.store_kv(k, v, got, slots)
    reference.store_kv(k, v, expected, slots)
    assert torch.equal(got, expected)


def test_copy_blocks_reads_all_sources_first() -> None:
    kv = randn(2, 6, 2, 4, 1, 2, dtype=torch.float32)
    expected = kv.clone()
    pairs = torch.tensor([[0, 1], [1, 2], [5, 0]])
    ops.copy_blocks(kv, pairs)
    reference.copy_blocks(expected, pairs)
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("block_tokens", [1, 3, 4])
@pytest.mark.parametrize("layers", [range(3), range(1, 2)])
def test_gather_blocks(block_tokens: int, layers: range) -> None:
    kv = randn(3, 6, 2, 4, 2, 5, dtype=torch.bfloat16)
    ids = torch.tensor([4, 0, 4])
    got = ops.gather_blocks(kv, ids, layers, block_tokens)
    assert got.is_contiguous()
    assert torch.equal(got, reference.gather_blocks(kv, ids, layers, block_tokens))


@pytest.mark.parametrize("first_slot", [0, 1, 3, 5])
@pytest.mark.parametrize(("source_count", "block_tokens"), [(1, 1), (2, 4), (1, 3), (3, 2), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scatter_blocks(first_slot: int, source_count: int, block_tokens: int, dtype: torch.dtype) -> None:
    got = torch.full((3, 6, 2, 4, 2, 5), -1.0)
    expected = got.clone()
    ids, layers = torch.tensor([4, 0, 2, 5]), range(1, 3)
    blocks = randn(2, source_count, 2, block_tokens, 2, 5, dtype=dtype)
    ops.scatter_blocks(got, ids, first_slot, layers, blocks)
    reference.scatter_blocks(expected, ids, first_slot, layers, blocks)
    assert torch.equal(got, expected)
