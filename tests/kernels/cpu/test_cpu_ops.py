"""The C++ operations against the reference, by the accuracy rule, and bit for bit against themselves.

A row's result must not depend on the threads, on the other rows of the batch, or on how its prompt was cut into chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels import reference, torch_ops
from kernels.attention_batch import build_attention_batch
from kernels.attention_variant import AttentionVariant
from kernels.cpu.library import Library, load
from tests.kernels.checks import CPU, NAN, Cache, Rows, assert_at_most_twice_the_error, check_attention, randn

if load() is None:
    pytest.skip("this machine has no C++ kernels", allow_module_level=True)

from kernels.cpu import ops

DTYPES = [torch.float32, torch.bfloat16]
HEAD_DIMS = [64, 80, 96, 128, 256]


@pytest.fixture
def library() -> Iterator[Library]:
    """With three threads, which may be more than there are cores, and as many as before at the end."""
    library = load()
    assert library is not None
    before = library.threads()
    library.set_threads(3)
    yield library
    library.set_threads(before)


def rows_of(cache: Cache, *spans: tuple[int, int]) -> Rows:
    return [(start, count, cache.take(start + count)) for start, count in spans]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (5, 123), (7, 3, 22), (33, 576), (2, 2, 2, 16)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool) -> None:
    # One column more than is used: rows are strided.
    x = randn(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., :-1]
    weight = randn(shape[-1], dtype=dtype, seed=1)
    residual = randn(*shape[:-1], shape[-1] + 2, dtype=dtype, seed=2)[..., 2:] if with_residual else None
    before = x.clone()
    got = ops.rms_norm(x, weight, 1e-5, residual)
    same = reference.rms_norm(x, weight, 1e-5, residual)
    truth = reference.rms_norm(x.double(), weight.double(), 1e-5, None if residual is None else residual.double())
    for index in range(2):
        assert_at_most_twice_the_error(got[index], same[index], truth[index])
    assert torch.equal(x, before), "the input is the caller's"
    assert with_residual or got[1] is x


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"), [(1, 1, 1, 2), (5, 9, 3, 64), (3, 8, 1, 22), (2, 3, 1, 80)]
)
def test_rope_store(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    angles = torch.arange(300, dtype=torch.float64)[:, None] * 100.0 ** -torch.linspace(0, 1, head_dim // 2)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
    positions = torch.tensor([299, 0, 7, 7, 123])[:tokens]
    slots = torch.tensor([31, 0, -1, 14, 15])[:tokens]
    # Views into one tensor, as the model passes them.
    q, k, v = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype).split((heads, kv_heads, kv_heads), 1)
    results = []
    for implementation, wide in ((ops, False), (reference, False), (reference, True)):
        kv = torch.full((8, 2, 4, kv_heads, head_dim), -1.0, dtype=torch.float64 if wide else dtype)
        inputs = [x.to(kv.dtype) for x in (q, k, v)]
        rotated = implementation.rope_store(*inputs, positions, table.double() if wide else table, kv, slots)
        results.append((rotated, kv))
    assert results[0][0].is_contiguous()
    for index in range(2):
        assert_at_most_twice_the_error(results[0][index], results[1][index], results[2][index])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (5, 246), (33, 3072)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (randn(shape[0], shape[1] + 3, dtype=dtype) * 4)[:, 3:]
    assert_at_most_twice_the_error(ops.silu_mul(x), reference.silu_mul(x), reference.silu_mul(x.double()))


def test_silu_mul_at_the_ends_of_float32() -> None:
    gate = torch.tensor([[-3e38, -200.0, -90.0, 0.0, 90.0, 200.0, 3e38]])
    got = ops.silu_mul(torch.cat((gate, torch.ones_like(gate)), -1))
    torch.testing.assert_close(got, gate.double().sigmoid().mul(gate.double()).float(), rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 8, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (2, 2)])
def test_head_sizes_in_a_ragged_batch(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    cache = Cache(16, kv_heads, head_dim, dtype)
    rows = rows_of(cache, (0, 1), (0, 19), (15, 1), (16, 1), (47, 1), (30, 7))
    check_attention(ops, cache, rows, heads, padding_rows=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 13, 16])
def test_groups(group: int, dtype: torch.dtype) -> None:
    cache = Cache(16, 2, 16, dtype)
    check_attention(ops, cache, rows_of(cache, (20, 1), (3, 14)), 2 * group)


@pytest.mark.parametrize("block_size", [1, 3, 16, 128])
@pytest.mark.parametrize("window", [None, 6])
def test_block_sizes(block_size: int, window: int | None) -> None:
    cache = Cache(block_size, 3, 24, torch.float32, num_blocks=160)
    rows = rows_of(cache, (0, 5), (9, 1), (0, 1), (13, 7), (40, 1), (16, 16))
    check_attention(ops, cache, rows, 9, AttentionVariant(0.2, window))


@pytest.mark.parametrize("window", [None, 1, 3, 5, 16, 100])
@pytest.mark.parametrize("start", [0, 1, 4, 17])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_one_row_at_every_alignment(start: int, count: int, window: int | None) -> None:
    cache = Cache(4, 2, 8, torch.float32)
    check_attention(ops, cache, rows_of(cache, (start, count)), 6, AttentionVariant(0.35, window))


SINKS = torch.tensor([0.5, -3.0, 4.0, 0.0])
CHOICES = {"window": (None, 21), "soft_cap": (None, 1.5), "sink_tokens": (0, 3), "sink_logits": (None, SINKS)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(CHOICES, 2)))
def test_variants_two_at_a_time(one: str, other: str, dtype: torch.dtype) -> None:
    variant = replace(AttentionVariant(0.25), **{one: CHOICES[one][1], other: CHOICES[other][1]})
    cache = Cache(4, 2, 16, dtype)
    check_attention(ops, cache, rows_of(cache, (0, 9), (31, 1), (37, 15), (0, 1), (2, 1)), 4, variant, padding_rows=1)


def test_rows_that_share_their_first_blocks() -> None:
    cache = Cache(4, 1, 8, torch.float32)
    shared = cache.take(12)
    rows = [(start, count, shared + cache.take(start + count - 12)) for start, count in [(12, 1), (14, 6), (19, 1)]]
    check_attention(ops, cache, rows, 4)


def test_blocks_before_the_window_may_be_anyone_elses() -> None:
    """Only sink tokens and the window are read, by either kind of row."""
    variant = AttentionVariant(0.25, window=5, sink_tokens=3)
    cache = Cache(4, 1, 16, torch.float32)
    rows = rows_of(cache, (40, 1), (40, 6))
    batch = build_attention_batch(rows, 4, CPU)
    cache.fill(batch)
    q = randn(7, 2, 16, dtype=torch.float32)
    expected = ops.paged_attention(q, cache.kv, batch, variant)
    for _, _, block_ids in rows:
        cache.kv[block_ids[1:9]] = NAN  # tokens 4 to 35: the oldest seen are 37 and 36
    got = ops.paged_attention(q, cache.kv, batch, variant)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_a_head_size_left_to_torch(dtype: torch.dtype) -> None:
    cache = Cache(4, 2, 22, dtype)
    check_attention(ops, cache, rows_of(cache, (9, 1), (3, 7)), 4, padding_rows=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float8_cache_is_left_to_torch(dtype: torch.dtype) -> None:
    cache = Cache(4, 2, 16, torch.float8_e4m3fn)
    check_attention(ops, cache, rows_of(cache, (0, 9), (11, 1)), 4, dtype=dtype)
    k = randn(2, 2, 16, dtype=dtype)
    table = torch.cat((torch.ones(4, 8), torch.zeros(4, 8)), -1)
    ops.rope_store(k, k, k, torch.tensor([0, 1]), table, cache.kv, torch.tensor([1, -1]))
    assert torch.equal(cache.kv[0, :, 1].float(), k[:1].to(torch.float8_e4m3fn).float().expand(2, 2, 16))


def attend(cache: Cache, rows: Rows, q: torch.Tensor, variant: AttentionVariant) -> tuple[torch.Tensor, torch.Tensor]:
    batch = build_attention_batch(rows, cache.kv.shape[2], CPU)
    return ops.paged_attention(q, cache.kv, batch, variant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "count"), [(32767, 1), (32760, 3), (0, 700)])
def test_long_rows(start: int, count: int, dtype: torch.dtype) -> None:
    """Against plain torch, which the reference holds to the same rule: one token at a time this would take minutes."""
    cache = Cache(16, 1, 64, dtype, num_blocks=2048)
    rows = rows_of(cache, (start, count))
    batch = build_attention_batch(rows, 16, CPU)
    cache.fill(batch)
    q = randn(count, 3, 64, dtype=dtype) * 2
    variant = AttentionVariant(0.125)
    got = ops.paged_attention(q, cache.kv, batch, variant)
    same = torch_ops.paged_attention(q, cache.kv, batch, variant)
    truth = torch_ops.paged_attention(q.double(), cache.kv.double(), batch, variant)
    for index in range(2):
        assert_at_most_twice_the_error(got[index], same[index], truth[index].double())


def test_q_may_be_a_view_of_more() -> None:
    cache = Cache(4, 2, 16, torch.float32)
    rows = rows_of(cache, (9, 1), (3, 7))
    cache.fill(build_attention_batch(rows, 4, CPU))
    wide = randn(8, 8, 20, dtype=torch.float32)
    view = wide[:, 1:5, 2:18]
    got = attend(cache, rows, view, AttentionVariant(0.25))
    expected = attend(cache, rows, view.contiguous(), AttentionVariant(0.25))
    assert torch.equal(got[0], expected[0])
    assert got[0].is_contiguous()


def test_one_batch_serves_layers_of_several_kinds() -> None:
    """What is kept of a batch must not be mistaken for another variant's, or another cache's."""
    caches = [Cache(4, 2, 16, dtype) for dtype in DTYPES]
    rows = rows_of(caches[0], (30, 1), (20, 7))
    batch = build_attention_batch(rows, 4, CPU)
    for variant in (AttentionVariant(0.25), AttentionVariant(0.25, window=5), AttentionVariant(0.5, sink_logits=SINKS)):
        for cache in caches:
            cache.fill(batch)
            q = randn(8, 4, 16, dtype=cache.kv.dtype)
            got = ops.paged_attention(q, cache.kv, batch, variant)
            expected = attend(cache, rows, q, variant)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])


DETERMINISM = [AttentionVariant(0.125), AttentionVariant(0.125, 150, 20.0, 2, torch.zeros(6))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", DETERMINISM)
def test_neither_threads_nor_neighbours_change_a_bit(
    library: Library, variant: AttentionVariant, dtype: torch.dtype
) -> None:
    cache = Cache(16, 2, 64, dtype, num_blocks=400)
    rows = rows_of(cache, (1500, 1), (0, 1), (100, 1), (0, 300), (255, 1), (256, 1), (77, 100), (500, 2))
    batch = build_attention_batch(rows, 16, CPU)
    cache.fill(batch)
    q = randn(len(batch.positions), 6, 64, dtype=dtype)
    together = attend(cache, rows, q, variant)
    for threads in (1, 2):
        library.set_threads(threads)
        again = attend(cache, rows, q, variant)
        assert torch.equal(again[0], together[0])
        assert torch.equal(again[1], together[1])
    for row, span in zip(rows, batch.spans, strict=True):
        tokens = slice(span.query_start, span.query_start + span.query_count)
        alone = attend(cache, [row], q[tokens], variant)
        assert torch.equal(alone[0], together[0][tokens])
        assert torch.equal(alone[1], together[1][tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", DETERMINISM)
def test_chunks_of_a_prompt_change_no_bit(variant: AttentionVariant, dtype: torch.dtype) -> None:
    """Chunks of one token aside: those are decode rows, which sum in another order."""
    cache = Cache(16, 2, 64, dtype, num_blocks=30)
    block_ids = cache.take(411)
    cache.fill(build_attention_batch([(0, 411, block_ids)], 16, CPU))
    q = randn(411, 6, 64, dtype=dtype)
    whole = attend(cache, [(0, 411, block_ids)], q, variant)
    for start, end in itertools.pairwise((0, 2, 67, 200, 330, 411)):
        chunk = attend(cache, [(start, end - start, block_ids)], q[start:end], variant)
        assert torch.equal(chunk[0], whole[0][start:end])
        assert torch.equal(chunk[1], whole[1][start:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_operations_on_one_row_or_many_agree(library: Library, dtype: torch.dtype) -> None:
    """A few rows run in the caller's thread, many are shared."""
    x, residual, weight = (randn(*shape, dtype=dtype, seed=len(shape)) for shape in ((300, 576), (300, 576), (576,)))
    normed, total = ops.rms_norm(x, weight, 1e-5, residual)
    gated = ops.silu_mul(x)
    heads = x.view(300, 9, 64)
    table, positions = randn(300, 64, dtype=torch.float32), torch.arange(300)
    kv = [torch.zeros(20, 2, 16, 2, 64, dtype=dtype) for _ in range(2)]
    turned = ops.rope_store(heads[:, :5], heads[:, 5:7], heads[:, 7:], positions, table, kv[0], positions)
    for row in range(0, 300, 7):
        one = slice(row, row + 1)
        alone = ops.rms_norm(x[one], weight, 1e-5, residual[one])
        assert torch.equal(alone[0], normed[one])
        assert torch.equal(alone[1], total[one])
        assert torch.equal(ops.silu_mul(x[one]), gated[one])
        q, k, v = heads[one].split((5, 2, 2), 1)
        assert torch.equal(ops.rope_store(q, k, v, positions[one], table, kv[1], positions[one]), turned[one])
        assert torch.equal(kv[1][row // 16, :, row % 16], kv[0][row // 16, :, row % 16])
