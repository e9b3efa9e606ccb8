"""Decode attention against the reference, by the accuracy rule: groups, head sizes, dtypes, variants, splits, tables.

Tiles are of 16 tokens where nothing else is said, so that short contexts have many of them.
"""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.attention_batch import AttentionBatch, build_attention_batch
from kernels.attention_variant import AttentionVariant
from tests.kernels.checks import CPU, DTYPES, NAN, Cache, assert_at_most_twice_the_error, check_attention, randn
from tests.kernels.gpu.compiled_for_hopper import compile_for_hopper

BFLOAT16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn


class Decode:
    """`decode_attention` as the op it is a part of, for a batch of nothing but decode rows."""

    def __init__(self, heads: int = 1, tile: int = 16, n_splits: int | None = None) -> None:
        self.heads, self.tile, self.n_splits = heads, tile, n_splits

    def paged_attention(
        self, q: torch.Tensor, kv_layer: torch.Tensor, batch: AttentionBatch, variant: AttentionVariant
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return decode(q, kv_layer, batch.context_lengths, batch.block_tables, variant, **vars(self))


def decode(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    variant: AttentionVariant,
    heads: int = 1,
    tile: int = 16,
    n_splits: int | None = None,
    tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Into tensors full of NaN, which only what is written replaces."""
    from kernels.gpu.decode_attention import decode_attention
    from kernels.gpu.tuning import Config

    output = torch.full(q.shape, NAN, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], NAN, device=q.device)
    config = Config({"HEADS": heads, "TILE": tile, "programs": 4}, num_warps=4, num_stages=3)
    decode_attention(q, kv_layer, tokens, context_lengths, block_tables, variant, output, lse, config, n_splits)
    return output, lse


def rows_of(cache: Cache, contexts: list[int]) -> list[tuple[int, int, list[int]]]:
    return [(context - 1, 1, cache.take(context)) for context in contexts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "kv_heads"), [(1, 2), (3, 1), (16, 1)])
def test_groups_in_every_dtype(device: torch.device, group: int, kv_heads: int, dtype: torch.dtype) -> None:
    cache = Cache(16, kv_heads, 64, dtype)
    rows = rows_of(cache, [1, 37])
    check_attention(Decode(n_splits=1), cache, rows, group * kv_heads, device=device, padding_rows=1)


@pytest.mark.parametrize(("group", "kv_heads"), [(2, 2), (4, 2), (5, 1), (7, 1), (8, 1), (12, 1)])
def test_more_sizes_of_group(device: torch.device, group: int, kv_heads: int) -> None:
    cache = Cache(16, kv_heads, 64, BFLOAT16)
    check_attention(Decode(n_splits=2), cache, rows_of(cache, [20]), group * kv_heads, device=device)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype", "tile"),
    [
        (64, 16, torch.float16, 32),
        (80, 32, BFLOAT16, 16),
        (80, 16, torch.float32, 64),
        (96, 16, BFLOAT16, 128),
        (96, 128, torch.float16, 64),
        (128, 64, BFLOAT16, 128),
        (128, 16, BFLOAT16, 64),
        (256, 16, BFLOAT16, 32),
        (256, 32, torch.float32, 16),
        (16, 5, torch.float32, 16),
    ],
)
def test_head_dims_block_sizes_and_tiles(
    device: torch.device, head_dim: int, block_size: int, dtype: torch.dtype, tile: int
) -> None:
    cache = Cache(block_size, 2, head_dim, dtype)
    check_attention(Decode(tile=tile, n_splits=2), cache, rows_of(cache, [130]), 2, device=device)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "group", "head_dim"),
    [(2, 2, 1, 64), (2, 4, 3, 80), (2, 4, 8, 64), (4, 4, 4, 128), (4, 8, 1, 64), (3, 3, 5, 16)],
)
def test_several_kv_heads_in_one_program(
    device: torch.device, heads: int, kv_heads: int, group: int, head_dim: int
) -> None:
    cache = Cache(16, kv_heads, head_dim, BFLOAT16)
    n_splits = 1 + kv_heads % 4 // 2
    check_attention(Decode(heads, 16, n_splits), cache, rows_of(cache, [31]), kv_heads * group, device=device)


@pytest.mark.parametrize(("n_splits", "dtype"), [(1, BFLOAT16), (2, BFLOAT16), (3, torch.float32), (40, torch.float16)])
def test_numbers_of_splits(device: torch.device, n_splits: int, dtype: torch.dtype) -> None:
    """Contexts of 1 to 6 tiles: more splits than tiles, fewer, and numbers that do not divide."""
    cache = Cache(16, 1, 64, dtype)
    rows = rows_of(cache, [1, 16, 17, 50, 90])
    check_attention(Decode(n_splits=n_splits), cache, rows, 2, device=device, padding_rows=2)


def test_more_splits_than_are_merged_at_once(device: torch.device) -> None:
    from kernels.gpu.kv_splits import MERGED_AT_ONCE

    # Of 6 heads, some have their largest score late, where what was merged before must fade.
    cache = Cache(16, 1, 16, torch.float32, num_blocks=2 * MERGED_AT_ONCE)
    rows = rows_of(cache, [16 * 2 * MERGED_AT_ONCE])
    check_attention(Decode(n_splits=100), cache, rows, 6, device=device)


@pytest.mark.parametrize(
    ("window", "sink_tokens", "soft_cap", "has_sink_logits", "n_splits", "dtype"),
    [
        (1, 0, None, True, 1, torch.float32),
        (16, 0, 2.0, False, 2, BFLOAT16),
        (17, 1, None, True, 2, torch.float32),
        (20, 16, 0.5, True, 1, torch.float16),
        (5, 20, None, False, 3, BFLOAT16),
        (33, 4, 30.0, False, 7, torch.float32),
        (33, 4, 1.0, True, 3, torch.float32),
        (1000, 3, None, True, 2, BFLOAT16),
        (None, 0, 3.0, True, 3, torch.float16),
        (None, 5, 2.0, False, 1, BFLOAT16),
        (None, 0, 0.01, False, 1, torch.float32),
        (None, 0, None, True, 1, torch.float16),
    ],
)
def test_variants(
    device: torch.device,
    window: int | None,
    sink_tokens: int,
    soft_cap: float | None,
    has_sink_logits: bool,
    n_splits: int,
    dtype: torch.dtype,
) -> None:
    cache = Cache(16, 1, 64, dtype)
    sink_logits = randn(4, dtype=torch.float32, seed=5) * 3 if has_sink_logits else None
    variant = AttentionVariant(0.125, window, soft_cap, sink_tokens, sink_logits)
    rows = rows_of(cache, [1, 17, 112])
    check_attention(Decode(n_splits=n_splits), cache, rows, 4, variant, device=device, padding_rows=1)


def test_keys_outside_the_window_are_not_read(device: torch.device) -> None:
    """They hold NaN here, and their blocks' ids are out of range: an engine may have given them to somebody else."""
    cache = Cache(16, 1, 64, torch.float32)
    batch = build_attention_batch(rows_of(cache, [200, 130]), 16, CPU)
    cache.fill(batch)
    variant = AttentionVariant(0.125, window=20, sink_tokens=18)
    q = randn(2, 2, 64, dtype=torch.float32)
    same = reference.paged_attention(q, cache.kv, batch, variant)
    truth = reference.paged_attention(q.double(), cache.kv.double(), batch, variant)
    tables = batch.block_tables.clone()
    for row, span in enumerate(batch.spans):
        oldest = span.context - 20
        cache.kv[tables[row, 1], :, 2:] = NAN
        cache.kv[tables[row, 2 : oldest // 16]] = NAN
        cache.kv[tables[row, oldest // 16], :, : oldest % 16] = NAN
        tables[row, 2 : oldest // 16] = 2**40
    for n_splits in (1, 3):
        arguments = (x.to(device) for x in (q, cache.kv, batch.context_lengths, tables))
        got = decode(*arguments, variant, n_splits=n_splits)
        for index in range(2):
            assert_at_most_twice_the_error(got[index], same[index], truth[index])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "n_splits"),
    [(BFLOAT16, 64, 1, 1), (BFLOAT16, 128, 2, 2), (torch.float16, 80, 2, 1), (torch.float32, 64, 1, 2)],
)
def test_float8_cache(device: torch.device, head_dim: int, heads: int, n_splits: int, dtype: torch.dtype) -> None:
    cache = Cache(32, 2, head_dim, FLOAT8)
    check_attention(Decode(heads, 16, n_splits), cache, rows_of(cache, [1, 53]), 8, dtype=dtype, device=device)


@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
def test_float8_cache_takes_any_bfloat16_query(device: torch.device, magnitude: float) -> None:
    """float16, which multiplies here, ends at 65,504."""
    cache = Cache(16, 1, 64, FLOAT8)
    batch = build_attention_batch(rows_of(cache, [40]), 16, CPU)
    cache.fill(batch)
    q = (randn(1, 4, 64, dtype=torch.float32) * magnitude).to(BFLOAT16)
    q[0, 0] = 0
    variant = AttentionVariant(0.25 / magnitude)
    same = reference.paged_attention(q, cache.kv, batch, variant)
    truth = reference.paged_attention(q.double(), cache.kv.double(), batch, variant)
    arguments = (x.to(device) for x in (q, cache.kv, batch.context_lengths, batch.block_tables))
    got = decode(*arguments, variant)
    for index in range(2):
        assert_at_most_twice_the_error(got[index], same[index], truth[index])


def test_rows_share_blocks_and_tables_are_wider_than_contexts(device: torch.device) -> None:
    cache = Cache(16, 1, 64, BFLOAT16)
    shared, wide = cache.take(64), cache.take(160)
    rows = [(64, 1, [*shared, *cache.take(1)]), (70, 1, [*shared, *cache.take(7)]), (79, 1, [*shared[::-1], *wide])]
    check_attention(Decode(n_splits=3), cache, rows, 4, device=device)
    batch = build_attention_batch(rows, 16, CPU)
    tables = torch.cat((batch.block_tables, torch.full((3, 50), 2**40)), dim=1)
    q = randn(3, 4, 64, dtype=BFLOAT16)
    variant = AttentionVariant(0.125)
    arguments = [x.to(device) for x in (q, cache.kv, batch.context_lengths)]
    narrow = decode(*arguments, batch.block_tables.to(device), variant, n_splits=3)
    broad = decode(*arguments, tables.to(device), variant, n_splits=3)
    for index in range(2):
        assert torch.equal(narrow[index], broad[index])


def test_rows_among_other_tokens(device: torch.device) -> None:
    """q is a strided view, as of a fused projection; the other tokens' results are somebody else's to write."""
    cache = Cache(16, 1, 64, BFLOAT16)
    batch = build_attention_batch(rows_of(cache, [20, 1, 45]), 16, CPU)
    cache.fill(batch)
    fused = randn(9, 6 * 64, dtype=BFLOAT16, seed=4).to(device)
    q = fused[:, : 4 * 64].view(9, 4, 64)
    tokens = torch.tensor([7, 0, 4])
    variant = AttentionVariant(0.125)
    there = [x.to(device) for x in (cache.kv, batch.context_lengths, batch.block_tables)]
    alone = decode(q[tokens.to(device)].contiguous(), *there, variant, n_splits=2)
    for n_splits in (1, 2):
        output, lse = decode(q, *there, variant, n_splits=n_splits, tokens=tokens.to(device))
        others = [token for token in range(9) if token not in tokens]
        assert output[others].isnan().all()
        assert lse[others].isnan().all()
        if n_splits == 2:
            assert torch.equal(output[tokens.to(device)], alone[0])
            assert torch.equal(lse[tokens.to(device)], alone[1])
        else:
            torch.testing.assert_close(output[tokens.to(device)], alone[0], rtol=2**-7, atol=2**-9)


def test_a_context_of_32k(device: torch.device) -> None:
    cache = Cache(128, 1, 64, BFLOAT16, num_blocks=260)
    rows = rows_of(cache, [32768])
    check_attention(Decode(tile=128, n_splits=3), cache, rows, 1, device=device)


def test_a_captured_launch_serves_other_contexts(device: torch.device) -> None:
    """Nothing that a launch decides depends on what tensors hold."""
    from kernels.gpu.decode_attention import decode_attention

    cache = Cache(16, 1, 64, BFLOAT16)
    cache.kv = randn(*cache.kv.shape, dtype=BFLOAT16).to(device)
    q = randn(2, 4, 64, dtype=BFLOAT16).to(device)
    variant = AttentionVariant(0.125)
    contexts = torch.tensor([1, 0], device=device)
    tables = torch.zeros(2, 10, dtype=torch.int64, device=device)
    output, lse = torch.empty_like(q), torch.empty(2, 4, device=device)

    def launch() -> None:
        decode_attention(q, cache.kv, None, contexts, tables, variant, output, lse, n_splits=4)

    launch()
    replay = launch
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        replay = graph.replay
    for seed, lengths in enumerate(([33, 160], [160, 1], [0, 77])):
        contexts.copy_(torch.tensor(lengths))
        tables.copy_(torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:20].view(2, 10))
        replay()
        expected = decode(q, cache.kv, contexts, tables, variant, tile=128, n_splits=1)
        torch.testing.assert_close(output, expected[0], rtol=2**-7, atol=2**-9)
        torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize(("kv_heads", "group", "dtype"), [(4, 1, BFLOAT16), (4, 4, BFLOAT16), (1, 16, FLOAT8)])
def test_every_candidate_of_the_tuning_is_right(
    device: torch.device, kv_heads: int, group: int, dtype: torch.dtype
) -> None:
    from kernels.gpu.decode_attention import _candidates, decode_attention

    kv = randn(8, 2, 16, kv_heads, 128, dtype=torch.float32).to(dtype).to(device)
    q = randn(1, kv_heads * group, 128, dtype=BFLOAT16).to(device)
    contexts, tables = torch.tensor([70], device=device), torch.tensor([[3, 1, 7, 0, 5]], device=device)
    variant = AttentionVariant(0.1)
    expected = decode(q, kv, contexts, tables, variant, tile=16, n_splits=1)
    candidates = _candidates(kv_heads, group, 128 * kv.element_size())
    if device.type == "cpu":
        # Warps and stages are nothing to the interpreter.
        candidates = list({tuple(sorted(x.sizes.items())): x for x in candidates}.values())
    for config in candidates:
        output, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
        decode_attention(q, kv, None, contexts, tables, variant, output, lse, config, n_splits=1)
        torch.testing.assert_close(output, expected[0], rtol=2**-7, atol=2**-9)
        torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-4)


def test_the_number_of_splits_follows_from_shapes() -> None:
    from kernels.gpu.kv_splits import split_count

    def splits(rows: int, max_tokens: int, programs_wanted: int = 8 * 132) -> int:
        return split_count(rows * 8, max_tokens, tile_tokens=64, programs_wanted=programs_wanted, processors=132)

    assert splits(64, 4096) == 3, "1,536 programs for 132 SMs"
    assert splits(64, 256) == 1, "short contexts are not worth a second kernel where rows fill the device"
    assert splits(1, 4096) == 17, "a program for each SM, whatever it costs"
    assert splits(1, 128) == 2, "no more than there are tiles"
    assert splits(1, 131072) == 132
    assert splits(256, 131072) == 1
    assert split_count(1, 2**20, 64, 8 * 132, 132) == 256


def test_no_rows_is_no_launch(device: torch.device) -> None:
    q = torch.empty(0, 4, 64, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    kv = torch.empty(1, 2, 16, 2, 64, device=device)
    output, lse = decode(q, kv, none, none.view(0, 1), AttentionVariant(1.0))
    assert output.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


COMPILED = """
from kernels.attention_variant import AttentionVariant
from kernels.gpu.decode_attention import _candidates, decode_attention

def decode(dtype=torch.bfloat16, kv_heads=8, group=4, head_dim=128, kv_dtype=None, config=None, **variant):
    q = torch.empty(64, kv_heads * group, head_dim, dtype=dtype)
    kv = torch.empty(1, 2, 16, kv_heads, head_dim, dtype=kv_dtype or dtype)
    contexts, tables = torch.empty(64, dtype=torch.int64), torch.empty(64, 256, dtype=torch.int64)
    lse = torch.empty(q.shape[:2])
    decode_attention(q, kv, None, contexts, tables, AttentionVariant(0.1, **variant), q, lse, config, n_splits=3)

"""
# What a Hopper SM has for all its programs, and for one: CUDA programming guide, compute capability 9.0.
SM_SHARED_BYTES, PROGRAM_SHARED_BYTES = 228 * 1024, 227 * 1024


def test_keys_are_on_the_way_while_others_are_multiplied() -> None:
    """As compiled for the target shape: two tiles of K and V are buffered, and three programs fit an SM."""
    attend, merge = compile_for_hopper(COMPILED + "decode()")
    assert attend["ttgir"].count("local_alloc : () -> !ttg.memdesc<2x64x128xbf16") == 2
    assert attend["ttgir"].count("ttg.async_copy_global_to_local") == 6, "2 tiles before the loop and 1 in it"
    assert 3 * (attend["shared"] + 1024) <= SM_SHARED_BYTES
    assert merge["name"] == "_merge_splits"


@pytest.mark.nightly
def test_every_candidate_compiles_and_fits() -> None:
    calls = """
for config in _candidates(8, 4, 256):
    decode(config=config)
for config in _candidates(8, 1, 512):
    decode(group=1, head_dim=256, config=config)
decode(kv_dtype=torch.float8_e4m3fn)
decode(torch.float16, kv_dtype=torch.float8_e4m3fn, head_dim=80)
decode(group=16, head_dim=96, window=100, sink_tokens=4, soft_cap=50.0, sink_logits=torch.empty(128))
decode(head_dim=64, group=1)
"""
    kernels = compile_for_hopper(COMPILED + calls)
    assert len(kernels) == 2 * (14 + 14 + 4)
    assert max(kernel["shared"] for kernel in kernels) <= PROGRAM_SHARED_BYTES
