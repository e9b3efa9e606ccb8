"""Paged attention for rows of several new tokens: bound by arithmetic, so the tensor cores must not wait.

FlashAttention-2's order (https://arxiv.org/abs/2307.08691): a program keeps one tile of queries, walks over the keys
with an online softmax in float32, and writes its output and log-sum-exp once. The batch is ragged, so the programs
follow a work list of (row, first token) that the host makes once per batch (kernels/gpu/prefill_plan.py); a tile's KV
heads are neighbours in it.

A tile packs the query heads that share a KV head: its members are (token, head of the group), and each byte of K and V
is read once for all of them. A short chunk of a long context fills a tile that way too. What a tile sees:

    keys     [sinks |  skipped  | left edge |    full: no mask     | diagonal |  skipped
             0                   window of   window of     first     last
                                 first token last token    token     token

Masked tiles of keys come first, in a loop of their own, then the full ones; the softmax does not mind the order. The
loop over full tiles runs the product with the values one tile late, as FlashAttention-3 does
(https://arxiv.org/abs/2407.08608): the tensor cores work on it while the softmax of the next tile is computed.

The roofline of the target, an H200 with 8 rows of 4,096 new tokens, 32 query and 8 KV heads of 128, bf16, causal:
    arithmetic   4 * 8 * 4,096 * 4,097 / 2 * 32 * 128 = 1,100 GFLOP: 1.39 ms of 790 TFLOP/s
                 3 % more in half-seen tiles, 3 % in the product that each program's first full tile is late by
    q, output    2 * 8 * 4,096 * 32 * 128 * 2 B = 537 MB
    K and V      134 MB if each row's stay in the L2 while its tiles run: 0.16 ms of 4.3 TB/s together, never the limit
"""

# mypy: disallow-untyped-decorators=False
from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl

from kernels.attention_batch import AttentionBatch
from kernels.attention_variant import AttentionVariant
from kernels.gpu import tuning
from kernels.gpu.key_tiles import LN2, LOG2E, accumulate, key_rows, online_softmax, score
from kernels.gpu.prefill_plan import DOT_SIDE_MIN, candidates, work_list

# Where a running maximum starts. Not -inf: a key tile may hide all its keys from a row, and -inf - -inf is NaN.
LOWEST = tl.constexpr(-1e30)
INT32_MAX = 2**31 - 1
# What changes from call to call must not compile the kernel anew for being 1 or a multiple of 16. The batch's tensors
# may be parts of one, at any multiple of 8 bytes.
UNSPECIALIZED = ["query_starts", "context_lengths", "block_tables", "table_stride", "window", "sink_tokens"]


@triton.jit
def _masked_tiles(
    first_position: tl.tensor,
    last_position: tl.tensor,
    window: tl.tensor,
    sink_tokens: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    TILE_KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(tiles of sinks, tiles at the left edge, where these begin, where the full ones begin, where they end)."""
    full_end = (first_position + 1) // TILE_KEYS * TILE_KEYS
    if HAS_WINDOW:
        left_begin = tl.maximum(first_position - window + 1, 0) // TILE_KEYS * TILE_KEYS
        full_begin = (tl.maximum(last_position - window + 1, 0) + TILE_KEYS - 1) // TILE_KEYS * TILE_KEYS
        # A short window's left edge and diagonal meet: then there are no full tiles.
        left_tiles = (tl.minimum(full_begin, full_end) - left_begin) // TILE_KEYS
        sink_tiles = tl.minimum((sink_tokens + TILE_KEYS - 1) // TILE_KEYS, left_begin // TILE_KEYS)
    else:
        left_begin = 0
        full_begin = 0
        left_tiles = 0
        sink_tiles = 0
    return sink_tiles, left_tiles, left_begin, full_begin, full_end


@triton.jit
def _attend_masked(
    q0: tl.tensor, q1: tl.tensor,
    acc0: tl.tensor, acc1: tl.tensor, row_max: tl.tensor, row_sum: tl.tensor,
    kv: tl.tensor, block_table: tl.tensor, slot_stride: tl.tensor,
    positions: tl.tensor, first_position: tl.tensor, last_position: tl.tensor,
    sink_tiles: tl.tensor, left_tiles: tl.tensor, left_begin: tl.tensor, full_end: tl.tensor,
    scale: tl.tensor, soft_cap: tl.tensor, window: tl.tensor, sink_tokens: tl.tensor,
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Takes in the tiles of sinks, of the left edge, of the diagonal, which begins at `full_end`."""
    diagonal_tiles = (last_position - full_end + TILE_KEYS) // TILE_KEYS
    for index in range(0, sink_tiles + left_tiles + diagonal_tiles):
        start = full_end + (index - sink_tiles - left_tiles) * TILE_KEYS
        if HAS_WINDOW:
            start = tl.where(index < sink_tiles + left_tiles, left_begin + (index - sink_tiles) * TILE_KEYS, start)
            start = tl.where(index < sink_tiles, index * TILE_KEYS, start)
        keys = start + tl.arange(0, TILE_KEYS)
        is_visible = keys[None, :] <= positions[:, None]
        # What nobody sees may be NaN, which a probability of 0 does not hide, or lie in no block at all.
        is_read = keys <= last_position
        if HAS_WINDOW:
            is_visible &= (keys[None, :] > positions[:, None] - window) | (keys < sink_tokens)[None, :]
            is_read &= (keys > first_position - window) | (keys < sink_tokens)
        rows = key_rows(kv, block_table, start, last_position, slot_stride, BLOCK_SIZE, TILE_KEYS)
        scores = score(q0, q1, rows, is_read, True, MAIN, REST)
        p, fade, row_max, row_sum = online_softmax(
            scores, scale, soft_cap, is_visible, row_max, row_sum, True, HAS_SOFT_CAP
        )
        rows += BLOCK_SIZE * slot_stride
        acc0, acc1 = accumulate(acc0, acc1, p, fade, rows, is_read, q0.dtype, True, MAIN, REST)
    return acc0, acc1, row_max, row_sum


@triton.jit
def _attend_full(
    q0: tl.tensor, q1: tl.tensor,
    acc0: tl.tensor, acc1: tl.tensor, row_max: tl.tensor, row_sum: tl.tensor,
    kv: tl.tensor, block_table: tl.tensor, slot_stride: tl.tensor, begin: tl.tensor, end: tl.tensor,
    scale: tl.tensor, soft_cap: tl.tensor,
    HAS_SOFT_CAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Takes in the tiles from `begin` to `end`, at least one.

    Of each iteration's two products only the first is waited for. The second uses the `p` of the iteration before;
    the first time that is 0, which spares the code of another product. `p` stays float32 until then, or the compiler
    would pass it through shared memory. Pointers to keys are computed one tile ahead: block ids that are loaded where
    they are used count as a stage of the software pipeline, and halve the distance at which K and V are fetched.
    """
    last = end - 1
    k_rows = key_rows(kv, block_table, begin, last, slot_stride, BLOCK_SIZE, TILE_KEYS)
    v_rows = k_rows + BLOCK_SIZE * slot_stride
    p = tl.zeros([q0.shape[0], TILE_KEYS], tl.float32)
    fade = tl.full(row_max.shape, 1.0, tl.float32)
    for start in range(begin, end, TILE_KEYS):
        scores = score(q0, q1, k_rows, True, False, MAIN, REST)
        acc0, acc1 = accumulate(acc0, acc1, p, fade, v_rows, True, q0.dtype, False, MAIN, REST)
        p, fade, row_max, row_sum = online_softmax(scores, scale, soft_cap, True, row_max, row_sum, False, HAS_SOFT_CAP)
        v_rows = k_rows + BLOCK_SIZE * slot_stride
        k_rows = key_rows(kv, block_table, start + TILE_KEYS, last, slot_stride, BLOCK_SIZE, TILE_KEYS)
    acc0, acc1 = accumulate(acc0, acc1, p, fade, v_rows, True, q0.dtype, False, MAIN, REST)
    return acc0, acc1, row_max, row_sum


@triton.jit
def _unit_queries(q0: tl.tensor, q1: tl.tensor, scale: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """bfloat16 queries as float16, for a cache of float8: two numbers of that become float16 by one instruction,
    bfloat16 by four. A power of two for each row moves its queries into float16's range, and into its scale."""
    wide0, wide1 = q0.to(tl.float32), q1.to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(wide0), 1), tl.max(tl.abs(wide1), 1))
    unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(top, 1e-30))))
    return (wide0 / unit[:, None]).to(tl.float16), (wide1 / unit[:, None]).to(tl.float16), scale * unit


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prefill_attention(
    q: tl.tensor, kv: tl.tensor, output: tl.tensor, lse: tl.tensor, sink_logits: tl.tensor,
    tile_rows: tl.tensor, tile_starts: tl.tensor,
    query_starts: tl.tensor, context_lengths: tl.tensor, block_tables: tl.tensor,
    q_token_stride: tl.tensor, q_head_stride: tl.tensor, table_stride: tl.tensor, kv_heads: tl.tensor,
    scale: tl.tensor, soft_cap: tl.tensor, window: tl.tensor, sink_tokens: tl.tensor,
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr, UNIT_QUERIES: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of queries and one KV head."""
    HEAD_DIM: tl.constexpr = MAIN + REST
    TILE_TOKENS: tl.constexpr = TILE_ROWS // GROUP
    kv_head = tl.program_id(0) % kv_heads
    tile = tl.program_id(0) // kv_heads
    row = tl.load(tile_rows + tile).to(tl.int64)
    first = tl.load(tile_starts + tile)
    row_begin = tl.load(query_starts + row)
    count = (tl.load(query_starts + row + 1) - row_begin).to(tl.int32)
    start_position = tl.load(context_lengths + row).to(tl.int32) - count
    end = tl.minimum(first + TILE_TOKENS, count)

    # Members past the tile's end repeat its last token and are not written.
    members = tl.arange(0, TILE_ROWS)
    is_written = first + members // GROUP < end
    tokens = tl.minimum(first + members // GROUP, end - 1)
    heads = kv_head * GROUP + members % GROUP
    q_rows = q + (row_begin + tokens) * q_token_stride + heads * q_head_stride
    q0 = tl.load(q_rows[:, None] + tl.arange(0, MAIN)[None, :])
    acc0 = tl.zeros([TILE_ROWS, MAIN], tl.float32)
    q1, acc1 = q0, 0
    if REST > 0:
        q1 = tl.load(q_rows[:, None] + (MAIN + tl.arange(0, REST))[None, :])
        acc1 = tl.zeros([TILE_ROWS, REST], tl.float32)
    row_scale = tl.full([TILE_ROWS], 1.0, tl.float32) * scale
    if UNIT_QUERIES:
        q0, q1, row_scale = _unit_queries(q0, q1, row_scale)
    row_max = tl.full([TILE_ROWS], LOWEST, tl.float32)
    row_sum = tl.zeros([TILE_ROWS], tl.float32)
    if HAS_SINK_LOGITS:
        row_max = tl.load(sink_logits + heads) * LOG2E
        row_sum = tl.full([TILE_ROWS], 1.0, tl.float32)

    kv += kv_head * HEAD_DIM
    slot_stride = kv_heads * HEAD_DIM
    block_table = block_tables + row * table_stride
    first_position, last_position = start_position + first, start_position + end - 1
    sink_tiles, left_tiles, left_begin, full_begin, full_end = _masked_tiles(
        first_position, last_position, window, sink_tokens, HAS_WINDOW, TILE_KEYS
    )
    acc0, acc1, row_max, row_sum = _attend_masked(
        q0, q1, acc0, acc1, row_max, row_sum, kv, block_table, slot_stride,
        start_position + tokens, first_position, last_position, sink_tiles, left_tiles, left_begin, full_end,
        row_scale, soft_cap, window, sink_tokens, HAS_WINDOW, HAS_SOFT_CAP, BLOCK_SIZE, TILE_KEYS, MAIN, REST,
    )  # fmt: skip
    if full_begin < full_end:
        acc0, acc1, row_max, row_sum = _attend_full(
            q0, q1, acc0, acc1, row_max, row_sum, kv, block_table, slot_stride, full_begin, full_end,
            row_scale, soft_cap, HAS_SOFT_CAP, BLOCK_SIZE, TILE_KEYS, MAIN, REST,
        )  # fmt: skip

    places = (row_begin + tokens) * (kv_heads * GROUP) + heads
    tl.store(lse + places, (row_max + tl.log2(row_sum)) * LN2, mask=is_written)
    outputs = output + places[:, None] * HEAD_DIM
    weight = (1.0 / row_sum)[:, None]
    main = (acc0 * weight).to(output.dtype.element_ty)
    tl.store(outputs + tl.arange(0, MAIN)[None, :], main, mask=is_written[:, None])
    if REST > 0:
        rest = (acc1 * weight).to(output.dtype.element_ty)
        tl.store(outputs + (MAIN + tl.arange(0, REST))[None, :], rest, mask=is_written[:, None])


def prefill_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    batch: AttentionBatch,
    rows: tuple[int, ...],
    variant: AttentionVariant,
    output: torch.Tensor,
    lse: torch.Tensor,
    config: tuning.Config | None = None,
) -> None:
    """`paged_attention` of `kernels/ops.py` for some `rows` of the batch, at least one, none of them padding.

    q [tokens, heads, head_dim], its last dimension contiguous. Writes these rows' tokens of output, contiguous and like
    q, and of lse [tokens, heads] float32, and no others. head_dim is 64, 80, 96, 128, 256 or any other power of two
    from 16 on or sum of two. Tile sizes are `config`'s, or tuned.
    """
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = kv_layer.shape[2:4]
    assert kv_layer.shape[1:] == (2, batch.block_size, kv_heads, head_dim), f"a cache of {tuple(kv_layer.shape)}"
    assert kv_layer.is_contiguous(), "a layer's cache is one run of blocks"
    assert kv_layer.dtype in (q.dtype, torch.float8_e4m3fn), f"a cache of {kv_layer.dtype} for q of {q.dtype}"
    assert heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} KV heads evenly"
    assert q.stride(2) == 1, "the last dimension of q is contiguous"
    assert (output.shape, output.dtype, output.is_contiguous()) == (q.shape, q.dtype, True), "output is like q"
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == (q.shape[:2], torch.float32, True), "lse is float32 per head"
    assert variant.scale > 0, f"scale is positive, not {variant.scale}"
    assert variant.window is None or variant.window > 0, "a token sees at least itself"

    def run(config: tuning.Config) -> None:
        _launch(q, kv_layer, batch, rows, variant, output, lse, config)

    if config is None:
        tokens_max = max(batch.spans[row].query_count for row in rows)
        choices = candidates(head_dim, q.dtype, heads // kv_heads, tokens_max)
        tile_rows = choices[0].sizes["TILE_ROWS"]
        variants = f"{variant.window is not None:d}{variant.soft_cap is not None:d}"
        key = (str(q.dtype), str(kv_layer.dtype), head_dim, heads // kv_heads, block_size, tile_rows, variants)
        config = tuning.choose("prefill_attention", key, choices, run)
    run(config)


def _launch(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    batch: AttentionBatch,
    rows: tuple[int, ...],
    variant: AttentionVariant,
    output: torch.Tensor,
    lse: torch.Tensor,
    config: tuning.Config,
) -> None:
    head_dim, kv_heads = q.shape[2], kv_layer.shape[3]
    group = q.shape[1] // kv_heads
    main = 1 << head_dim.bit_length() - 1
    rest = head_dim - main
    assert main >= DOT_SIDE_MIN, f"head_dim {head_dim} is below {DOT_SIDE_MIN}"
    assert rest == 0 or (rest >= DOT_SIDE_MIN and rest.bit_count() == 1), f"head_dim {head_dim} is no sum of two powers"
    key = ("prefill work list", rows, config.sizes["TILE_ROWS"] // group)
    if key not in batch.plans:
        batch.plans[key] = work_list(batch, rows, config.sizes["TILE_ROWS"] // group)
    tile_rows, tile_starts = cast(tuple[torch.Tensor, torch.Tensor], batch.plans[key])
    _prefill_attention[(len(tile_rows) * kv_heads,)](
        q,
        kv_layer,
        output,
        lse,
        variant.sink_logits,
        tile_rows,
        tile_starts,
        batch.query_starts,
        batch.context_lengths,
        batch.block_tables,
        q.stride(0),
        q.stride(1),
        batch.block_tables.stride(0),
        kv_heads,
        variant.scale,
        variant.soft_cap or 1.0,
        min(variant.window or 0, INT32_MAX),
        variant.sink_tokens,
        HAS_WINDOW=variant.window is not None,
        HAS_SOFT_CAP=variant.soft_cap is not None,
        HAS_SINK_LOGITS=variant.sink_logits is not None,
        UNIT_QUERIES=q.dtype == torch.bfloat16 and kv_layer.dtype == torch.float8_e4m3fn,
        GROUP=group,
        BLOCK_SIZE=kv_layer.shape[2],
        MAIN=main,
        REST=rest,
        **config.sizes,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
