"""Paged attention for rows of one new token: bound by memory, so each byte of K and V is read once, for all heads.

Flash-decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html): a row's visible keys are split over several
programs, each with an online softmax over its part; `kernels/gpu/kv_splits.py` divides and merges.

A program packs the query heads of `heads` neighbouring KV heads into one tile of at least 16 rows, which is what the
tensor cores take. With several KV heads a query stands in its own KV head's columns and the other columns are zero: one
product then gives the scores of all, and what is read of a token is one run of memory, `heads` times as long:

    q [rows, heads * head_dim] = | q0  0 |     k [tile, heads * head_dim] = | k0 k1 |     scores = q · kᵀ
                                 |  0 q1 |

The roofline of the target, an H200 with batch 64, context 4,096, 32 query and 8 KV heads of 128, bf16:
    K and V       64 * 4,096 * 8 * 128 * 2 * 2 B = 1,074 MB; q, output and block tables together are below 4 MB
    parts         3 splits: 64 * 32 * 3 * 129 * 4 B = 3.2 MB, written and read once, and small enough to stay in the L2
    arithmetic    4 * 64 * 4,096 * 32 * 128 = 4.3 GFLOP, 17 padded to 16 rows: 22 us of 790 TFLOP/s, never the limit
    time          251 us at the 4.3 TB/s that a copy reaches there, 295 us at 85 % of it
At context 2,047 that is 125 us; FlashAttention-3's published figure is 140 us.
"""

# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kernels.attention_variant import AttentionVariant
from kernels.gpu import tuning
from kernels.gpu.key_tiles import tanh
from kernels.gpu.kv_splits import (
    LN2,
    LOG2E,
    NO_WINDOW,
    add_sink_logit,
    merge_splits,
    split_count,
    tile_places,
    visible_tiles,
)
from kernels.gpu.tuning import Config

# tl.dot's smallest side, and the rows of a warp's matrix instruction (mma.sync m16n8k16). Hopper's own wants 64.
DOT_SIDE_MIN = 16
# Larger tiles only add registers: what a tile costs whatever its size is small by then.
TILE_MAX = 128
# What the tensor cores multiply. float8 becomes float16, which holds all its values and takes one conversion
# instruction for two of them; bfloat16 takes four. Where q is bfloat16, it must be brought into float16's range.
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _load_query(
    pointers: tl.tensor, is_own: tl.tensor, score_scale: tl.tensor, OPERAND: tl.constexpr, SCALES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(the query as an operand, what each row's scores are multiplied by). With SCALES, a row is first divided by a
    power of two that leaves no element larger than 1."""
    query = tl.load(pointers, mask=is_own, other=0.0)
    row_scale = tl.full([query.shape[0]], 1.0, tl.float32) * score_scale
    if SCALES:
        wide = query.to(tl.float32)
        power = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(wide), 1), 1e-30))))
        query = wide / power[:, None]
        row_scale *= power
    return query.to(OPERAND), row_scale


@triton.jit
def _scores(
    query: tl.tensor, keys: tl.tensor, row_scale: tl.tensor, cap_scale: tl.tensor, is_seen: tl.tensor,
    HAS_SOFT_CAP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * row_scale[:, None]
    if HAS_SOFT_CAP:
        scores = tanh(scores) * cap_scale
    return tl.where(is_seen[None, :], scores, float("-inf"))


# What changes from call to call must not compile anew for being 1 or a multiple of 16.
@triton.jit(do_not_specialize=["table_stride", "window", "sink_tokens", "n_splits"])
def _attend_split(
    q: tl.tensor, kv: tl.tensor, tokens: tl.tensor, context_lengths: tl.tensor, block_tables: tl.tensor,
    sink_logits: tl.tensor, output: tl.tensor, lse: tl.tensor,
    q_token_stride: tl.tensor, q_head_stride: tl.tensor, table_stride: tl.tensor,
    score_scale: tl.tensor, cap_scale: tl.tensor, window: tl.tensor, sink_tokens: tl.tensor, n_splits: tl.tensor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    OPERAND: tl.constexpr, SCALES_QUERY: tl.constexpr, HAS_TOKENS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr, IS_SPLIT: tl.constexpr,
) -> None:  # fmt: skip
    """One row, `HEADS` KV heads, one split. With IS_SPLIT, output and lse are the float32 parts
    [n, heads, n_splits, head_dim] and [n, heads, n_splits] in base 2, otherwise the real ones."""
    row = (tl.program_id(0) // (KV_HEADS // HEADS)).to(tl.int64)
    first_kv_head = tl.program_id(0) % (KV_HEADS // HEADS) * HEADS
    context = tl.load(context_lengths + row).to(tl.int32)
    sink_tiles, skipped_tiles, tiles = visible_tiles(context, window, sink_tokens, TILE)
    split_tiles = (tiles + n_splits - 1) // n_splits
    first = tl.program_id(1) * split_tiles
    end = tl.minimum(first + split_tiles, tiles)
    if IS_SPLIT and first >= end:
        return
    token = row
    if HAS_TOKENS:
        token = tl.load(tokens + row)

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    heads = first_kv_head * GROUP + rows
    is_head = rows < HEADS * GROUP
    is_column = columns < HEADS * HEAD_DIM
    # A row's own columns are those of its KV head; to the others its query is zero.
    is_own = (rows[:, None] // GROUP == columns[None, :] // HEAD_DIM) & is_head[:, None] & is_column[None, :]
    q_places = heads[:, None] * q_head_stride + (columns % HEAD_DIM)[None, :]
    query, row_scale = _load_query(q + token * q_token_stride + q_places, is_own, score_scale, OPERAND, SCALES_QUERY)

    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    table = block_tables + row * table_stride
    keys_of_block = kv + first_kv_head * HEAD_DIM + columns[None, :]
    values_offset = BLOCK_SIZE * KV_HEADS * HEAD_DIM
    place = tile_places(first, sink_tiles, skipped_tiles, TILE)
    block = tl.load(table + place // BLOCK_SIZE, mask=place < context, other=0)
    for index in range(first, end):
        is_seen = place < context
        if HAS_WINDOW:
            is_seen = is_seen & ((place >= context - window) | (place < sink_tokens))
        pointers = keys_of_block + (block * (2 * values_offset) + place % BLOCK_SIZE * (KV_HEADS * HEAD_DIM))[:, None]
        # The ids of the next tile's blocks, one iteration early. Were they loaded where they are used, Triton's
        # pipeline would spend half of its stages on them (3.6: of 3 stages one buffer for the keys, not two).
        place = tile_places(index + 1, sink_tiles, skipped_tiles, TILE)
        block = tl.load(table + place // BLOCK_SIZE, mask=place < context, other=0)
        # Slots that are not seen may hold NaN, and 0 * NaN is NaN: they are not read at all.
        is_read = is_seen[:, None] & is_column[None, :]
        keys = tl.load(pointers, mask=is_read, other=0.0).to(OPERAND)
        values = tl.load(pointers + values_offset, mask=is_read, other=0.0).to(OPERAND)
        scores = _scores(query, keys, row_scale, cap_scale, is_seen, HAS_SOFT_CAP)
        # Every tile visited has a key that is seen, so this is finite, and -inf - -inf cannot arise.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        fade = tl.exp2(largest - new_largest)
        total = total * fade + tl.sum(weights, 1)
        summed = tl.dot(weights.to(OPERAND), values, acc=summed * fade[:, None], input_precision="ieee")
        largest = new_largest
    part = heads + token * (KV_HEADS * GROUP)
    if IS_SPLIT:
        part = (heads + row * (KV_HEADS * GROUP)) * n_splits + tl.program_id(1)
    _store(
        summed, largest, total, output + part[:, None] * HEAD_DIM + (columns % HEAD_DIM)[None, :], is_own,
        lse + part, is_head, sink_logits + heads, HAS_SINK_LOGITS and not IS_SPLIT, IS_SPLIT,
    )  # fmt: skip


@triton.jit
def _store(
    summed: tl.tensor, largest: tl.tensor, total: tl.tensor, outputs: tl.tensor, is_own: tl.tensor, lses: tl.tensor,
    is_head: tl.tensor, sink_logits: tl.tensor, ADDS_SINK_LOGITS: tl.constexpr, IN_BASE_2: tl.constexpr,
) -> None:  # fmt: skip
    # A row of context 0 has seen nothing: 0 and -inf.
    total = tl.where(total == 0.0, 1.0, total)
    scale, lse = 1.0 / total, largest + tl.log2(total)
    if ADDS_SINK_LOGITS:
        scale, lse = add_sink_logit(scale, lse, tl.load(sink_logits, mask=is_head, other=0.0))
    if not IN_BASE_2:
        lse *= LN2
    tl.store(lses, lse, mask=is_head)
    tl.store(outputs, (summed * scale[:, None]).to(outputs.dtype.element_ty), mask=is_own)


def decode_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    tokens: torch.Tensor | None,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    variant: AttentionVariant,
    output: torch.Tensor,
    lse: torch.Tensor,
    config: Config | None = None,
    n_splits: int | None = None,
) -> None:
    """`paged_attention` of `kernels/ops.py` for n rows of one new token each; row i's is tokens[i] [n] int64 of
    q [tokens, heads, head_dim], or token i without `tokens`.

    Row i sees context_lengths[i] [n] int64 keys in the blocks block_tables[i] [n, max_blocks] int64 of kv_layer
    [num_blocks, 2, block_size, kv_heads, head_dim]. Writes these tokens' rows of output, contiguous and like q, and of
    lse [tokens, heads] float32, and no others; 0 and -inf where the context is 0. Tile sizes are `config`'s, or tuned;
    `n_splits` is chosen from shapes unless given. Nothing here waits for the device.
    """
    n, heads, head_dim = len(context_lengths), q.shape[1], q.shape[2]
    _, two, block_size, kv_heads, kv_head_dim = kv_layer.shape
    assert kv_layer.is_contiguous(), "a layer's cache is one run of blocks"
    assert two == 2, f"K and V are 2, not {two}"
    assert kv_head_dim == head_dim, f"q has heads of {head_dim}, the cache of {kv_head_dim}"
    assert heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} KV heads evenly"
    assert kv_layer.dtype in (q.dtype, torch.float8_e4m3fn), f"a cache of {kv_layer.dtype} for q of {q.dtype}"
    assert q.stride(2) == 1, "the last dimension of q is contiguous"
    assert output.is_contiguous(), "output is like q, but contiguous"
    assert (output.shape, output.dtype) == (q.shape, q.dtype), "output is like q"
    assert lse.is_contiguous(), "lse is contiguous"
    assert (lse.shape, lse.dtype) == (q.shape[:2], torch.float32), "lse is a float32 for each head"
    assert block_tables.stride(1) == 1, "each row of block_tables is contiguous"
    assert len(block_tables) == n, f"{len(block_tables)} rows of block_tables for {n} contexts"
    assert all(x is None or x.dtype == torch.int64 for x in (tokens, context_lengths, block_tables)), "ids are int64"
    assert (tokens is None and n <= len(q)) or (tokens is not None and len(tokens) == n), "each row has one token"
    assert variant.window is None or variant.window > 0, "a token sees at least itself"
    if n == 0:
        return

    def run(config: Config) -> None:
        splits = n_splits
        if splits is None:
            programs, processors = n * kv_heads // config.sizes["HEADS"], _processors(q.device)
            wanted = processors * config.sizes["programs"]
            splits = split_count(programs, block_tables.shape[1] * block_size, config.sizes["TILE"], wanted, processors)
        _launch(q, kv_layer, tokens, context_lengths, block_tables, variant, output, lse, splits, config)

    if config is None:
        group = heads // kv_heads
        key = (str(q.dtype), str(kv_layer.dtype), head_dim, group, kv_heads, block_size)
        load = "full" if n * kv_heads >= _processors(q.device) else "sparse"
        candidates = _candidates(kv_heads, group, head_dim * kv_layer.element_size())
        config = tuning.choose("decode_attention", (*key, load), candidates, run)
    run(config)


@functools.cache
def _candidates(kv_heads: int, group: int, head_bytes: int) -> tuple[Config, ...]:
    """Programs of HEADS KV heads and tiles of TILE tokens; splitting aims at so many `programs` for each processor.

    The first is the guess for a device that has not been tuned; nothing here has been measured. Its stage is 32 KB, of
    which 3 stages keep 2 in shared memory; 3 programs on an SM then have 96 to 192 KB on the way, where 4.8 TB/s at a
    latency of 1 us take 36 KB an SM. As Triton 3.6 compiles it for head_dim 128, a tile of 64 tokens takes 1,700
    instructions of the 7,000 that an SM can issue while it arrives; of float8, in tiles of 128, 2,300 of 3,500.
    """
    found = []
    for heads, stage_kilobytes, num_warps, num_stages, programs in (
        (1, 32, 4, 3, 8),
        (1, 32, 4, 3, 4),
        (1, 32, 4, 3, 16),
        (1, 32, 4, 4, 8),
        (1, 32, 8, 3, 8),
        (1, 16, 4, 4, 8),
        (1, 16, 4, 5, 16),
        (1, 64, 4, 2, 4),
        (1, 64, 8, 3, 4),
        (2, 32, 4, 3, 8),
        (2, 32, 8, 3, 8),
        (2, 64, 8, 3, 4),
        (4, 32, 8, 3, 8),
        (4, 64, 8, 3, 4),
    ):
        tokens = (stage_kilobytes << 10) // (2 * heads * head_bytes)
        tile = min(TILE_MAX, max(DOT_SIDE_MIN, 1 << tokens.bit_length() - 1))
        if heads == 1 or (kv_heads % heads == 0 and heads * group <= DOT_SIDE_MIN):
            found.append(Config({"HEADS": heads, "TILE": tile, "programs": programs}, num_warps, num_stages))
    return tuple(found)


@functools.cache
def _processors(device: torch.device) -> int:
    # The interpreter runs one program after the other.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    tokens: torch.Tensor | None,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    variant: AttentionVariant,
    output: torch.Tensor,
    lse: torch.Tensor,
    n_splits: int,
    config: Config,
) -> None:
    n, (_, all_heads, head_dim), (_, _, block_size, kv_heads, _) = len(context_lengths), q.shape, kv_layer.shape
    heads, group = config.sizes["HEADS"], all_heads // kv_heads
    parts, part_lses = output, lse
    if n_splits > 1:
        parts = torch.empty(n, all_heads, n_splits, head_dim, dtype=torch.float32, device=q.device)
        part_lses = torch.empty(n, all_heads, n_splits, dtype=torch.float32, device=q.device)
    is_float8 = kv_layer.dtype == torch.float8_e4m3fn
    window = NO_WINDOW if variant.window is None else min(variant.window, NO_WINDOW)
    cap, sink_logits = variant.soft_cap, variant.sink_logits
    _attend_split[(n * (kv_heads // heads), n_splits)](
        q,
        kv_layer,
        # An absent tensor's place is taken by one that is there and is not read.
        context_lengths if tokens is None else tokens,
        context_lengths,
        block_tables,
        lse if sink_logits is None else sink_logits,
        parts,
        part_lses,
        *(q.stride(0), q.stride(1), block_tables.stride(0)),
        # The kernel's exponentials are of base 2.
        variant.scale * LOG2E.value if cap is None else variant.scale / cap,
        0.0 if cap is None else cap * LOG2E.value,
        *(window, variant.sink_tokens, n_splits),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HEADS=heads,
        ROWS=max(DOT_SIDE_MIN, triton.next_power_of_2(heads * group)),
        COLUMNS=triton.next_power_of_2(heads * head_dim),
        TILE=config.sizes["TILE"],
        OPERAND=TRITON_DTYPES[torch.float16 if is_float8 and q.dtype == torch.bfloat16 else q.dtype],
        SCALES_QUERY=is_float8 and q.dtype == torch.bfloat16,
        HAS_TOKENS=tokens is not None,
        HAS_WINDOW=variant.window is not None,
        HAS_SOFT_CAP=cap is not None,
        HAS_SINK_LOGITS=sink_logits is not None,
        IS_SPLIT=n_splits > 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if n_splits > 1:
        merge_splits(
            *(parts, part_lses, tokens, context_lengths, sink_logits, output, lse),
            *(window, variant.sink_tokens, config.sizes["TILE"]),
        )
