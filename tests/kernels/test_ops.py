"""Plain torch against the reference: error to float64 at most twice the reference's own in the same dtype."""

from __future__ import annotations

import pytest
import torch

from kernels import reference, torch_ops
from kernels.attention_batch import build_attention_batch
from kernels.attention_variant import AttentionVariant
from kernels.torch_attention import attend_math, merge
from tests.kernels.checks import CPU, DTYPES, Cache, Rows, assert_at_most_twice_the_error, check_attention, randn

PLAIN = AttentionVariant(0.25)


def check(cache: Cache, rows: Rows, heads: int, window: int | None = None) -> None:
    variant = AttentionVariant(cache.kv.shape[-1] ** -0.5, window)
    check_attention(torch_ops, cache, rows, heads, variant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (5, 123), (7, 3, 22), (33, 576)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    residual = randn(*shape, dtype=dtype, seed=2) if with_residual else None
    before = x.clone()
    got = torch_ops.rms_norm(x, weight, 1e-5, residual)
    same = reference.rms_norm(x, weight, 1e-5, residual)
    truth = reference.rms_norm(x.double(), weight.double(), 1e-5, None if residual is None else residual.double())
    for index in range(2):
        assert_at_most_twice_the_error(got[index], same[index], truth[index])
    assert torch.equal(x, before), "the input is the caller's"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 1, 1, 2), (5, 9, 3, 64), (3, 8, 1, 22)])
def test_rope_store(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    angles = torch.arange(300, dtype=torch.float64)[:, None] * 100.0 ** -torch.linspace(0, 1, head_dim // 2)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
    positions = torch.tensor([299, 0, 7, 7, 123])[:tokens]
    slots = torch.tensor([31, 0, -1, 14, 15])[:tokens]
    # Views into one tensor, as the model passes them.
    q, k, v = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype).split((heads, kv_heads, kv_heads), 1)
    results = []
    for ops, wide in ((torch_ops, False), (reference, False), (reference, True)):
        kv = torch.full((8, 2, 4, kv_heads, head_dim), -1.0, dtype=torch.float64 if wide else dtype)
        inputs = [x.to(kv.dtype) for x in (q, k, v)]
        rotated = ops.rope_store(*inputs, positions, table.double() if wide else table, kv, slots)
        results.append((rotated, kv))
    for index in range(2):
        assert_at_most_twice_the_error(results[0][index], results[1][index], results[2][index])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 246), (33, 3072)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype) * 4
    assert_at_most_twice_the_error(torch_ops.silu_mul(x), reference.silu_mul(x), reference.silu_mul(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (9, 3), (8, 2), (8, 1)])
def test_decode_rows_of_context_1_exact_block_and_many_blocks(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    cache = Cache(4, kv_heads, 16, dtype)
    check(cache, [(start, 1, cache.take(start + 1)) for start in (0, 2, 3, 4, 7, 30)], heads)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 16, 100])
@pytest.mark.parametrize("start", [0, 1, 4, 7, 17])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_one_row_at_every_alignment(start: int, count: int, window: int | None) -> None:
    cache = Cache(4, 2, 10, torch.float32)
    check(cache, [(start, count, cache.take(start + count))], 6, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("window", [None, 6])
def test_a_ragged_batch_of_both_kinds_of_row(block_size: int, window: int | None, dtype: torch.dtype) -> None:
    cache = Cache(block_size, 3, 22, dtype, num_blocks=160)
    spans = [(0, 5), (9, 1), (0, 1), (13, 7), (40, 1), (16, 16)]
    check(cache, [(start, count, cache.take(start + count)) for start, count in spans], 9, window)


@pytest.mark.parametrize("window", [None, 6])
def test_rows_that_share_their_first_blocks(window: int | None) -> None:
    cache = Cache(4, 1, 8, torch.float32)
    shared = cache.take(12)
    rows = [(start, count, shared + cache.take(start + count - 12)) for start, count in [(12, 1), (14, 6), (19, 1)]]
    check(cache, rows, 4, window)


def test_a_table_longer_than_the_context_is_cut() -> None:
    cache = Cache(4, 1, 8, torch.float32)
    check(cache, [(5, 1, cache.take(40)), (0, 3, cache.take(20))], 2)


def test_the_decode_batch_is_split_only_when_padding_dominates() -> None:
    """The answer is the same either way (above); this pins the rule."""
    cache = Cache(4, 1, 8, torch.float32)
    for starts, groups in (((9, 10, 11), 1), ((0, 0, 0, 0, 60), 2)):
        batch = build_attention_batch([(start, 1, cache.take(start + 1)) for start in starts], 4, CPU)
        q = torch.zeros(len(starts), 2, 8)
        kv = torch.zeros_like(cache.kv)
        torch_ops.paged_attention(q, kv, batch, PLAIN)
        (plan,) = batch.plans.values()
        assert len(plan.decode) == groups


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_independent_path_agrees(dtype: torch.dtype) -> None:
    q, k, v = (randn(2, 3, tokens, 16, dtype=dtype, seed=tokens) for tokens in (7, 9, 9))
    mask = torch.zeros(7, 9).masked_fill_(randn(7, 9, dtype=torch.float32) > 1, float("-inf"))
    scores = q.double() @ k.double().transpose(-1, -2) * 0.25 + mask
    truth, truth_lse = scores.softmax(-1) @ v.double(), scores.logsumexp(-1)
    got, lse = attend_math(q, k, v, False, mask, PLAIN)
    low = ((q @ k.transpose(-1, -2)) * 0.25 + mask.to(dtype)).softmax(-1) @ v
    assert_at_most_twice_the_error(got, low, truth)
    assert (lse.double() - truth_lse).abs().max() <= 4 * torch.finfo(torch.float32).eps * truth_lse.abs().max()
    causal = attend_math(k, k, v, True, None, PLAIN)[0]
    hidden = torch.full((9, 9), float("-inf")).triu(1)
    assert torch.equal(causal, attend_math(k, k, v, False, hidden, PLAIN)[0])


def test_merging_two_halves_gives_the_whole() -> None:
    q, k, v = (randn(2, tokens, 16, dtype=torch.float64, seed=tokens) for tokens in (5, 12, 12))
    whole = attend_math(q, k, v, False, None, PLAIN)
    halves = [attend_math(q, k[:, part], v[:, part], False, None, PLAIN) for part in (slice(0, 5), slice(5, 12))]
    for got, expected in zip(merge(halves[0], halves[1]), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


VARIANTS = {
    "soft cap": AttentionVariant(0.25, soft_cap=1.5),
    "window and soft cap": AttentionVariant(0.25, window=5, soft_cap=1.5),
    "sink tokens": AttentionVariant(0.25, window=5, sink_tokens=3),
    "sink logits": AttentionVariant(0.25, sink_logits=torch.tensor([0.5, -3.0, 4.0, 0.0])),
    "everything": AttentionVariant(0.25, 6, 2.0, 2, torch.tensor([0.5, -3.0, 4.0, 0.0])),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_in_a_ragged_batch_with_padding(name: str, dtype: torch.dtype) -> None:
    cache = Cache(4, 2, 16, dtype)
    rows = [(start, count, cache.take(start + count)) for start, count in [(0, 9), (11, 1), (17, 5), (0, 1), (2, 1)]]
    check_attention(torch_ops, cache, rows, 4, VARIANTS[name], padding_rows=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float8_cache(dtype: torch.dtype) -> None:
    cache = Cache(4, 2, 16, torch.float8_e4m3fn)
    rows = [(start, count, cache.take(start + count)) for start, count in [(0, 9), (11, 1), (17, 5)]]
    check_attention(torch_ops, cache, rows, 4, dtype=dtype)
    k = randn(3, 2, 16, dtype=dtype)
    table = torch.cat((torch.ones(4, 8), torch.zeros(4, 8)), -1)
    torch_ops.rope_store(k, k, k, torch.tensor([0, 1, 2]), table, cache.kv, torch.tensor([1, 0, -1]))
    assert torch.equal(cache.kv[0, :, 1].float(), k[:1].to(torch.float8_e4m3fn).float().expand(2, 2, 16))


def test_copy_blocks() -> None:
    kv = randn(2, 6, 2, 4, 1, 2, dtype=torch.float32)
    expected = kv.clone()
    pairs = torch.tensor([[0, 1], [0, 2], [5, 4]])
    torch_ops.copy_blocks(kv, pairs)
    reference.copy_blocks(expected, pairs)
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("block_tokens", [1, 3, 4])
@pytest.mark.parametrize("layers", [range(3), range(1, 2)])
def test_gather_blocks(block_tokens: int, layers: range) -> None:
    kv = randn(3, 6, 2, 4, 2, 5, dtype=torch.bfloat16)
    ids = torch.tensor([4, 0, 4])
    got = torch_ops.gather_blocks(kv, ids, layers, block_tokens)
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
    torch_ops.scatter_blocks(got, ids, first_slot, layers, blocks)
    reference.scatter_blocks(expected, ids, first_slot, layers, blocks)
    assert torch.equal(got, expected)
