"""The keys that a row sees, divided over several programs, and their partial results merged into one.

    visible tiles of a row   [sink tiles | .... skipped by the window .... | the window's tiles, the last one partial]
    counted                    0   1                                         2   3   4   5   6   7
    3 splits                  └───────────────────── 0 ─────────────────────────┘ └── 1 ──┘ └── 2 ──┘

The splits divide the tiles that the row really sees, so a short row keeps as many programs busy as it has tiles, and
splits left without a tile end at once. How many there are is the same for all rows and decided on the host, from shapes
alone: a captured graph serves whatever the contexts turn out to be.

Parts merge by their log-sum-exps: o = Σ oᵢ · 2^(lᵢ - l), l = log2 Σ 2^lᵢ, all in base 2.
"""

# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Below this many tokens a split's own costs (its query, its partial result) are no longer small beside its keys.
SPLIT_TOKENS_MIN = 512
SPLITS_MAX = 256
# Partial results that a merging program has in flight at once: 32 * 128 * 4 B = 16 KB.
MERGED_AT_ONCE = 32
# A window that no context reaches: layers without one take part in the same arithmetic.
NO_WINDOW = 2**31 - 1


def split_count(programs: int, max_tokens: int, tile_tokens: int, programs_wanted: int, processors: int) -> int:
    """How many splits for `programs` independent pieces of work of at most `max_tokens` each.

    Enough that every processor has a program; and, as long as splits stay large, enough for `programs_wanted` in all,
    so that the last ones to run are a small part of the whole.
    """
    to_fill = min(-(-processors // programs), -(-max_tokens // tile_tokens))
    to_balance = min(-(-programs_wanted // programs), max_tokens // SPLIT_TOKENS_MIN)
    return min(max(to_fill, to_balance, 1), SPLITS_MAX)


@triton.jit
def visible_tiles(
    context: tl.tensor, window: tl.tensor, sink_tokens: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(tiles of sink tokens, tiles skipped after these, tiles to visit in all) of the last token of `context`."""
    first_tile = tl.maximum(context - window, 0) // TILE
    sink_tiles = tl.minimum((sink_tokens + TILE - 1) // TILE, first_tile)
    skipped_tiles = first_tile - sink_tiles
    return sink_tiles, skipped_tiles, (context + TILE - 1) // TILE - skipped_tiles


@triton.jit
def tile_places(index: tl.tensor, sink_tiles: tl.tensor, skipped_tiles: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Positions in the context of the tokens of visible tile `index`."""
    return tl.where(index < sink_tiles, index, index + skipped_tiles) * TILE + tl.arange(0, TILE)


@triton.jit
def add_sink_logit(scale: tl.tensor, lse: tl.tensor, sink_logit: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(what the sum of values is multiplied by, log-sum-exp in base 2) with one more score, that has no value. A row
    that sees nothing has -inf and keeps it."""
    sink = sink_logit * LOG2E
    top = tl.maximum(lse, sink)
    joined = top + tl.log2(tl.exp2(lse - top) + tl.exp2(sink - top))
    is_empty = lse == float("-inf")
    return tl.where(is_empty, scale, scale * tl.exp2(lse - joined)), tl.where(is_empty, lse, joined)


# What changes from call to call must not compile anew for being 1 or a multiple of 16.
@triton.jit(do_not_specialize=["window", "sink_tokens", "n_splits"])
def _merge_splits(
    parts: tl.tensor, part_lses: tl.tensor, tokens: tl.tensor, context_lengths: tl.tensor, sink_logits: tl.tensor,
    output: tl.tensor, lse: tl.tensor, window: tl.tensor, sink_tokens: tl.tensor, n_splits: tl.tensor,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    HAS_TOKENS: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr,
) -> None:  # fmt: skip
    """One head of one row. Idle splits have written nothing: which they are follows from the context again."""
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    context = tl.load(context_lengths + row).to(tl.int32)
    _, _, tiles = visible_tiles(context, window, sink_tokens, TILE)
    split_tiles = tl.maximum((tiles + n_splits - 1) // n_splits, 1)
    used_splits = (tiles + split_tiles - 1) // split_tiles
    token = row
    if HAS_TOKENS:
        token = tl.load(tokens + row)

    columns = tl.arange(0, COLUMNS)
    is_column = columns < HEAD_DIM
    first_part = (row * HEADS + head) * n_splits
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    summed = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, used_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        is_used = split < used_splits
        part_lse = tl.load(part_lses + first_part + split, mask=is_used, other=float("-inf"))
        part = tl.load(
            parts + (first_part + split)[:, None] * HEAD_DIM + columns[None, :],
            mask=is_used[:, None] & is_column[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(part_lse, 0))
        weights = tl.exp2(part_lse - new_largest)
        fade = tl.exp2(largest - new_largest)
        total = total * fade + tl.sum(weights, 0)
        summed = summed * fade + tl.sum(part * weights[:, None], 0)
        largest = new_largest

    total = tl.where(total == 0.0, 1.0, total)
    scale = 1.0 / total
    merged_lse = largest + tl.log2(total)
    if HAS_SINK_LOGITS:
        scale, merged_lse = add_sink_logit(scale, merged_lse, tl.load(sink_logits + head))
    place = token * HEADS + head
    tl.store(lse + place + tl.arange(0, 1), merged_lse * LN2)
    tl.store(output + place * HEAD_DIM + columns, (summed * scale).to(output.dtype.element_ty), mask=is_column)


def merge_splits(
    parts: torch.Tensor,
    part_lses: torch.Tensor,
    tokens: torch.Tensor | None,
    context_lengths: torch.Tensor,
    sink_logits: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    sink_tokens: int,
    tile_tokens: int,
) -> None:
    """From parts [n, heads, n_splits, head_dim] and part_lses [n, heads, n_splits] in base 2, both float32 and of tiles
    of `tile_tokens`, writes row i's output [tokens, heads, head_dim] and natural lse [tokens, heads] of token
    tokens[i]. Adds the sink logits, which belong to no part."""
    n, heads, n_splits, head_dim = parts.shape
    assert part_lses.shape == parts.shape[:3]
    assert all(x.is_contiguous() for x in (parts, part_lses, output, lse))
    _merge_splits[(n * heads,)](
        parts,
        part_lses,
        # An absent tensor's place is taken by one that is there and is not read.
        context_lengths if tokens is None else tokens,
        context_lengths,
        lse if sink_logits is None else sink_logits,
        output,
        lse,
        window,
        sink_tokens,
        n_splits,
        HEADS=heads,
        HEAD_DIM=head_dim,
        COLUMNS=triton.next_power_of_2(head_dim),
        TILE=tile_tokens,
        SPLITS=MERGED_AT_ONCE,
        HAS_TOKENS=tokens is not None,
        HAS_SINK_LOGITS=sink_logits is not None,
        num_warps=4,
    )
