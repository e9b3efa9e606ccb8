"""Prefill attention against the reference, by the accuracy rule: tiles at every alignment, groups, head sizes, dtypes,
all variants by pairs, chunks, tables.

Tiles are of 16 members of a group and 16 keys where nothing else is said, so that short rows have many of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from kernels import reference
from kernels.attention_batch import AttentionBatch, build_attention_batch
from kernels.attention_variant import AttentionVariant
from tests.kernels.checks import CPU, DTYPES, NAN, Cache, assert_at_most_twice_the_error, check_attention, randn

BFLOAT16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Prefill:
    """`prefill_attention` as the op it is a part of, for a batch of nothing but its rows. Tiles of 0 are the default's.

    Results go into tensors full of NaN, which only what is written replaces.
    """

    tile_rows: int = 16
    tile_keys: int = 16

    def paged_attention(
        self, q: torch.Tensor, kv_layer: torch.Tensor, batch: AttentionBatch, variant: AttentionVariant
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from kernels.gpu.prefill_attention import prefill_attention
        from kernels.gpu.tuning import Config

        output = torch.full(q.shape, NAN, dtype=q.dtype, device=q.device)
        lse = torch.full(q.shape[:2], NAN, device=q.device)
        config = Config({"TILE_ROWS": self.tile_rows, "TILE_KEYS": self.tile_keys}, num_warps=4, num_stages=2)
        rows = tuple(range(len(batch.spans)))
        prefill_attention(q, kv_layer, batch, rows, variant, output, lse, config if self.tile_rows else None)
        return output, lse


def rows_of(cache: Cache, spans: list[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
    return [(start, count, cache.take(start + count)) for start, count in spans]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"),
    [
        (3, 3, torch.float16),
        (4, 2, BFLOAT16),
        (6, 2, torch.float32),
        (5, 1, BFLOAT16),
        (6, 1, torch.float16),
        (7, 1, torch.float32),
        (8, 1, torch.float16),
        (13, 1, BFLOAT16),
        (16, 1, BFLOAT16),
    ],
)
def test_every_size_of_group(device: torch.device, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    cache = Cache(16, kv_heads, 16, dtype)
    check_attention(Prefill(), cache, rows_of(cache, [(0, 1), (14, 5)]), heads, device=device)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "tile_rows", "tile_keys", "dtype"),
    [
        (64, 16, 16, 32, BFLOAT16),
        (64, 128, 32, 64, torch.float16),
        (80, 32, 16, 16, BFLOAT16),
        (80, 16, 32, 64, torch.float32),
        (96, 16, 32, 16, torch.float16),
        (96, 64, 16, 128, BFLOAT16),
        (128, 16, 64, 128, BFLOAT16),
        (128, 128, 16, 32, torch.float32),
        (256, 32, 16, 64, BFLOAT16),
        (256, 16, 32, 16, torch.float16),
        (32, 5, 16, 16, torch.float32),
        (32, 48, 16, 32, BFLOAT16),
    ],
)
def test_head_dims_block_sizes_and_tiles(
    device: torch.device, head_dim: int, block_size: int, tile_rows: int, tile_keys: int, dtype: torch.dtype
) -> None:
    cache = Cache(block_size, 2, head_dim, dtype)
    rows = rows_of(cache, [(60, 21)])
    check_attention(Prefill(tile_rows, tile_keys), cache, rows, 4, device=device)


@pytest.mark.parametrize("window", [None, 15, 16])
@pytest.mark.parametrize("start", [0, 15, 16, 31, 53])
def test_one_row_at_every_alignment(device: torch.device, start: int, window: int | None) -> None:
    """Tiles of 8 tokens: the counts are one less than some tiles, exactly as many, and one more."""
    cache = Cache(16, 1, 16, torch.float32)
    rows = rows_of(cache, [(start, 15), (start, 16), (start, 17)])
    check_attention(Prefill(), cache, rows, 2, AttentionVariant(0.25, window), device=device)


# Between them every pair of (window, sink tokens, soft cap, sink logits, dtype, block against tile) has met.
@pytest.mark.parametrize(
    ("window", "sink_tokens", "soft_cap", "has_sink_logits", "dtype", "block_size"),
    [
        (None, 0, None, False, torch.float32, 16),
        (None, 0, 1.0, True, BFLOAT16, 32),
        (None, 5, None, True, torch.float16, 8),
        (None, 20, 30.0, False, FLOAT8, 16),
        (1, 0, 1.0, False, torch.float16, 16),
        (1, 5, 30.0, True, torch.float32, 32),
        (1, 20, None, True, BFLOAT16, 8),
        (1, 5, None, False, FLOAT8, 32),
        (17, 0, 30.0, True, FLOAT8, 8),
        (17, 5, 1.0, False, BFLOAT16, 16),
        (17, 20, 1.0, True, torch.float32, 8),
        (17, 0, None, False, torch.float16, 32),
        (34, 20, 30.0, True, torch.float16, 32),
        (34, 5, None, True, torch.float32, 16),
        (34, 0, 30.0, False, BFLOAT16, 8),
        (34, 20, 1.0, False, FLOAT8, 16),
        (1000, 5, 30.0, False, BFLOAT16, 32),
        (1000, 0, None, True, torch.float32, 8),
        (1000, 20, 1.0, True, torch.float16, 16),
    ],
)
def test_variants(
    device: torch.device,
    window: int | None,
    sink_tokens: int,
    soft_cap: float | None,
    has_sink_logits: bool,
    dtype: torch.dtype,
    block_size: int,
) -> None:
    cache = Cache(block_size, 1, 32, dtype)
    sink_logits = randn(2, dtype=torch.float32, seed=5) * 3 if has_sink_logits else None
    variant = AttentionVariant(32**-0.5, window, soft_cap, sink_tokens, sink_logits)
    rows = rows_of(cache, [(0, 3), (83, 19)])
    check_attention(Prefill(), cache, rows, 2, variant, dtype=BFLOAT16 if dtype == FLOAT8 else None, device=device)


@pytest.mark.parametrize(
    ("q_dtype", "head_dim", "magnitude"),
    [
        (torch.float32, 64, 1.0),
        (torch.float16, 80, 1.0),
        (BFLOAT16, 96, 1.0),
        (BFLOAT16, 64, 1e-20),
        (BFLOAT16, 80, 1e20),
    ],
)
def test_float8_cache(device: torch.device, q_dtype: torch.dtype, head_dim: int, magnitude: float) -> None:
    """float16, which multiplies bfloat16 queries here, ends at 65,504."""
    cache = Cache(16, 1, head_dim, FLOAT8)
    batch = build_attention_batch(rows_of(cache, [(19, 9)]), 16, CPU)
    cache.fill(batch)
    q = (randn(9, 2, head_dim, dtype=torch.float32) * magnitude).to(q_dtype)
    q[3, 1] = 0
    variant = AttentionVariant(0.25 / magnitude)
    same = reference.paged_attention(q, cache.kv, batch, variant)
    truth = reference.paged_attention(q.double(), cache.kv.double(), batch, variant)
    there = build_attention_batch([(19, 9, batch.block_tables[0].tolist())], 16, device)
    got = Prefill().paged_attention(q.to(device), cache.kv.to(device), there, variant)
    for index in range(2):
        assert_at_most_twice_the_error(got[index], same[index], truth[index])


def test_chunks_give_what_the_whole_prompt_gives(device: torch.device) -> None:
    """Bit for bit, as these chunks begin where a tile of the whole prompt does: 8 tokens."""
    cache = Cache(16, 1, 32, BFLOAT16)
    blocks = cache.take(70)
    batch = build_attention_batch([(0, 70, blocks)], 16, CPU)
    cache.fill(batch)
    q, kv, variant = randn(70, 2, 32, dtype=BFLOAT16).to(device), cache.kv.to(device), AttentionVariant(0.2)
    whole, whole_lse = Prefill().paged_attention(q, kv, build_attention_batch([(0, 70, blocks)], 16, device), variant)
    for begin, end in ((0, 16), (16, 40), (40, 70), (64, 65)):
        chunk = build_attention_batch([(begin, end - begin, blocks)], 16, device)
        output, lse = Prefill().paged_attention(q[begin:end], kv, chunk, variant)
        assert torch.equal(output, whole[begin:end])
        assert torch.equal(lse, whole_lse[begin:end])


def test_rows_share_blocks_and_tables_are_permuted(device: torch.device) -> None:
    cache = Cache(16, 1, 16, BFLOAT16)
    shared = cache.take(48)
    rows = [(48, 5, [*shared, *cache.take(5)]), (50, 30, [*shared[::-1], *cache.take(32)]), (16, 9, shared[1:])]
    check_attention(Prefill(tile_keys=64), cache, rows, 2, device=device)


@pytest.mark.parametrize("tile_keys", [16, 64])
def test_keys_outside_the_window_are_not_read(device: torch.device, tile_keys: int) -> None:
    """They hold NaN here, and their blocks' ids are out of range: an engine may have given them to somebody else."""
    cache = Cache(16, 1, 16, torch.float32)
    specification = rows_of(cache, [(180, 20), (120, 9)])
    batch = build_attention_batch(specification, 16, CPU)
    cache.fill(batch)
    variant = AttentionVariant(0.25, window=20, sink_tokens=18)
    q = randn(29, 2, 16, dtype=torch.float32)
    same = reference.paged_attention(q, cache.kv, batch, variant)
    truth = reference.paged_attention(q.double(), cache.kv.double(), batch, variant)
    there = build_attention_batch(specification, 16, device)
    for row, span in enumerate(batch.spans):
        oldest = span.start + 1 - 20
        table = batch.block_tables[row]
        cache.kv[table[1], :, 2:] = NAN
        cache.kv[table[2 : oldest // 16]] = NAN
        cache.kv[table[oldest // 16], :, : oldest % 16] = NAN
        there.block_tables[row, 2 : oldest // 16] = 2**30
    got = Prefill(32, tile_keys).paged_attention(q.to(device), cache.kv.to(device), there, variant)
    for index in range(2):
        assert_at_most_twice_the_error(got[index], same[index], truth[index])


def test_only_its_rows_are_written(device: torch.device) -> None:
    """q is a strided view, as of a fused projection; the other rows are the decode kernel's, or padding."""
    from kernels.gpu.prefill_attention import prefill_attention

    cache = Cache(16, 2, 16, BFLOAT16)
    specification = [*rows_of(cache, [(7, 1), (3, 6), (30, 1), (0, 18)]), (-1, 1, [])]
    batch = build_attention_batch(specification, 16, device)
    cache.fill(build_attention_batch(specification, 16, CPU))
    kv, variant = cache.kv.to(device), AttentionVariant(0.25)
    q = randn(27, 8 * 16, dtype=BFLOAT16).to(device)[:, 32:96].view(27, 4, 16)
    output = torch.full(q.shape, NAN, dtype=BFLOAT16, device=device)
    lse = torch.full((27, 4), NAN, device=device)
    prefill_attention(q, kv, batch, (1, 3), variant, output, lse)
    written = torch.tensor([False] + [True] * 6 + [False] + [True] * 18 + [False])
    assert torch.equal(output.isfinite().all(-1).all(-1).cpu(), written)
    assert torch.equal(output.isnan().all(-1).all(-1).cpu(), ~written)
    assert torch.equal(lse.isnan().all(-1).cpu(), ~written)
    alone = build_attention_batch([specification[1], specification[3]], 16, device)
    expected = Prefill(0).paged_attention(q[written.to(device)].contiguous(), kv, alone, variant)
    assert torch.equal(output[written.to(device)], expected[0])
    assert torch.equal(lse[written.to(device)], expected[1])


def test_a_handful_of_queries_over_32k(device: torch.device) -> None:
    cache = Cache(128, 1, 64, BFLOAT16, num_blocks=260)
    check_attention(Prefill(16, 256), cache, rows_of(cache, [(32766, 2)]), 1, device=device)


def test_blocks_beyond_two_gigabytes(device: torch.device) -> None:
    """Offsets into the cache are int64. On a CPU only the blocks in use take memory."""
    kv = torch.empty(2**19 + 2, 2, 16, 1, 128, dtype=BFLOAT16, device=device)
    assert kv.numel() > 2**31
    small = Cache(16, 1, 128, BFLOAT16, num_blocks=4)
    batch = build_attention_batch([(20, 7, [3, 1])], 16, device)
    small.fill(build_attention_batch([(20, 7, [3, 1])], 16, CPU))
    kv[2**19 + 1] = small.kv[3].to(device)
    kv[2**19] = small.kv[1].to(device)
    far = build_attention_batch([(20, 7, [2**19 + 1, 2**19])], 16, device)
    q = randn(7, 2, 128, dtype=BFLOAT16).to(device)
    got = Prefill().paged_attention(q, kv, far, AttentionVariant(0.1))
    expected = Prefill().paged_attention(q, small.kv.to(device), batch, AttentionVariant(0.1))
    for index in range(2):
        assert torch.equal(got[index], expected[index])


@pytest.mark.parametrize(("head_dim", "group", "dtype"), [(128, 4, BFLOAT16), (96, 3, FLOAT8), (256, 1, torch.float32)])
def test_every_candidate_of_the_tuning_is_right(
    device: torch.device, head_dim: int, group: int, dtype: torch.dtype
) -> None:
    from kernels.gpu.prefill_attention import prefill_attention
    from kernels.gpu.prefill_plan import candidates

    q_dtype = BFLOAT16 if dtype == FLOAT8 else dtype
    kv = randn(16, 2, 16, 1, head_dim, dtype=torch.float32).to(dtype).to(device)
    batch = build_attention_batch([(110, 40, [3, 1, 7, 0, 5, 9, 12, 4, 11, 2])], 16, device)
    q = randn(40, group, head_dim, dtype=q_dtype).to(device)
    variant = AttentionVariant(head_dim**-0.5)
    expected = Prefill(32, 32).paged_attention(q, kv, batch, variant)
    configs = candidates(head_dim, q_dtype, group, 40)
    if device.type == "cpu":
        # Warps and stages are nothing to the interpreter.
        configs = list({tuple(sorted(config.sizes.items())): config for config in configs}.values())
    for config in configs:
        output, lse = torch.empty_like(q), torch.empty(40, group, device=device)
        prefill_attention(q, kv, batch, (0,), variant, output, lse, config)
        torch.testing.assert_close(output, expected[0], rtol=2**-7, atol=2**-8)
        torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-4)


def test_few_queries_get_small_tiles() -> None:
    from kernels.gpu.prefill_plan import candidates

    for group, tokens_max in ((1, 2), (1, 16), (4, 5), (3, 33), (4, 32), (8, 4096), (16, 1)):
        for dtype in DTYPES:
            sizes = [config.sizes["TILE_ROWS"] for config in candidates(128, dtype, group, tokens_max)]
            assert sizes
            assert max(sizes) <= max(16, 2 ** math.ceil(math.log2(group * tokens_max)))
            assert min(sizes) >= group


def test_the_work_list_covers_every_token_once_longest_first() -> None:
    from kernels.gpu.prefill_plan import work_list

    blocks = list(range(10))
    batch = build_attention_batch([(0, 7, blocks), (9, 1, blocks), (3, 40, blocks), (11, 8, blocks)], 8, CPU)
    rows, starts = work_list(batch, (0, 2, 3), 8)
    assert rows.dtype == starts.dtype == torch.int32
    assert list(zip(rows.tolist(), starts.tolist(), strict=True)) == [
        *((2, start) for start in (32, 24, 16, 8, 0)),
        (3, 0),
        (0, 0),
    ]
