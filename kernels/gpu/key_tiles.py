"""Attention's arithmetic on one tile of keys in a paged cache, for kernels that hold a tile of queries.

A head's first MAIN elements and its last REST, each a power of two, are tiles of their own, so that a head_dim of 80 or
96 is not padded to 128. Without REST the second ones (`q1`, `acc1`) stand for nothing.
"""

# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """To float32's accuracy everywhere. Near 0, where 1 - e^-2x cancels, Lambert's continued fraction
    x / (1 + x² / (3 + x² / (5 + x² / (7 + x² / 9)))), whose error is below 1e-9 there."""
    square = x * x
    small = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    # By e^-2|x|, which cannot overflow.
    fade = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - fade) / (1.0 + fade)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0, -large, large))


@triton.jit
def key_rows(
    kv: tl.tensor,
    block_table: tl.tensor,
    start: tl.tensor,
    last_position: tl.tensor,
    slot_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
) -> tl.tensor:
    """Pointers to the keys [TILE_KEYS] from `start` on, a multiple of TILE_KEYS; their values lie BLOCK_SIZE *
    slot_stride further. Past the table's end, which `last_position` tells, they point into some block."""
    places = tl.arange(0, TILE_KEYS)
    if BLOCK_SIZE % TILE_KEYS == 0:
        entries = start // BLOCK_SIZE
        slots = start % BLOCK_SIZE + places
    elif TILE_KEYS % BLOCK_SIZE == 0:
        # All but one addition is the same in every tile.
        entries = start // BLOCK_SIZE + places // BLOCK_SIZE
        slots = places % BLOCK_SIZE
    else:
        entries = (start + places) // BLOCK_SIZE
        slots = (start + places) % BLOCK_SIZE
    blocks = tl.load(block_table + tl.minimum(entries, last_position // BLOCK_SIZE))
    # Block ids fit into int32. The product of two of these is one instruction, of two int64 it is four.
    return kv + blocks.to(tl.int32).to(tl.int64) * (2 * BLOCK_SIZE * slot_stride) + slots * slot_stride


@triton.jit
def _load(
    rows: tl.tensor, is_read: tl.tensor, MASKED: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    pointers = rows[:, None] + (FIRST + tl.arange(0, WIDTH))[None, :]
    if MASKED:  # noqa: SIM108 - decided when compiling
        elements = tl.load(pointers, mask=is_read[:, None], other=0.0)
    else:
        elements = tl.load(pointers)
    return elements


@triton.jit
def score(
    q0: tl.tensor,
    q1: tl.tensor,
    rows: tl.tensor,
    is_read: tl.tensor,
    MASKED: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
) -> tl.tensor:
    """q · kᵀ, float32."""
    k0 = _load(rows, is_read, MASKED, 0, MAIN)
    scores = tl.dot(q0, tl.trans(k0.to(q0.dtype)), input_precision="ieee")
    if REST > 0:
        k1 = _load(rows, is_read, MASKED, MAIN, REST)
        scores = tl.dot(q1, tl.trans(k1.to(q1.dtype)), scores, input_precision="ieee")
    return scores


@triton.jit
def online_softmax(
    scores: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    is_visible: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    MASKED: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(e^(score - maximum), what earlier sums shrink by, the new maximum in base 2, the new sum). `scale` and all but
    the first are one number for each row."""
    if HAS_SOFT_CAP:
        scores = soft_cap * tanh(scores * (scale / soft_cap)[:, None])
        scale = tl.full(scale.shape, 1.0, tl.float32)
    scale *= LOG2E
    if MASKED:
        # Scaled before they are masked: a scale may be so small that it is 0, and 0 * -inf is NaN.
        scores = tl.where(is_visible, scores * scale[:, None], float("-inf"))
        scale = tl.full(scale.shape, 1.0, tl.float32)
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale[:, None] - new_max[:, None])
    fade = tl.exp2(row_max - new_max)
    return p, fade, new_max, row_sum * fade + tl.sum(p, 1)


@triton.jit
def accumulate(
    acc0: tl.tensor,
    acc1: tl.tensor,
    p: tl.tensor,
    fade: tl.tensor,
    rows: tl.tensor,
    is_read: tl.tensor,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """acc * fade + p · v, multiplied as DTYPE, summed in float32."""
    v0 = _load(rows, is_read, MASKED, 0, MAIN)
    p = p.to(DTYPE)
    acc0 = tl.dot(p, v0.to(DTYPE), acc0 * fade[:, None], input_precision="ieee")
    if REST > 0:
        v1 = _load(rows, is_read, MASKED, MAIN, REST)
        acc1 = tl.dot(p, v1.to(DTYPE), acc1 * fade[:, None], input_precision="ieee")
    return acc0, acc1
