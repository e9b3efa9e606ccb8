"""Rotary positions (https://arxiv.org/abs/2104.09864) for q and k, and k and v into the cache: one kernel, one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Heads of one program. With 16 and a head_dim of 128, a thread of 4 warps holds 8 elements of each half of a head:
# 16-byte accesses in bfloat16.
HEADS = 16
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _turn(
    x: tl.tensor,
    here: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    half: tl.constexpr,
    column: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of rotated heads, in x's dtype. `x` points to the first elements of [HEADS, 1] heads."""
    first = tl.load(x + column[None, :], mask=here, other=0.0).to(tl.float32)
    second = tl.load(x + half + column[None, :], mask=here, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _rope_store(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    positions: tl.tensor,
    table: tl.tensor,
    kv_layer: tl.tensor,
    slots: tl.tensor,
    rotated: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Programs of a token: first those of q's heads, then those of the KV heads."""
    half: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    q_programs = tl.cdiv(heads, HEADS)
    column = tl.arange(0, COLUMNS)
    turns = table + tl.load(positions + token) * table_stride + column
    cos = tl.load(turns, mask=column < half, other=0.0)[None, :]
    sin = tl.load(turns + half, mask=column < half, other=0.0)[None, :]
    if tl.program_id(1) < q_programs:
        head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
        here = (head < heads) & (column < half)[None, :]
        first, second = _turn(q + token * q_token_stride + head * q_head_stride, here, cos, sin, half, column)
        target = rotated + (token * heads + head) * HEAD_DIM + column[None, :]
        tl.store(target, first, mask=here)
        tl.store(target + half, second, mask=here)
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            head = ((tl.program_id(1) - q_programs) * HEADS + tl.arange(0, HEADS))[:, None]
            here = (head < kv_heads) & (column < half)[None, :]
            first, second = _turn(k + token * k_token_stride + head * k_head_stride, here, cos, sin, half, column)
            value = v + token * v_token_stride + head * v_head_stride + column[None, :]
            # A block holds its keys, then its values: the slots of all blocks before it count twice.
            row = slot + slot // BLOCK_SIZE * BLOCK_SIZE
            key_target = kv_layer + (row * kv_heads + head) * HEAD_DIM + column[None, :]
            value_target = kv_layer + ((row + BLOCK_SIZE) * kv_heads + head) * HEAD_DIM + column[None, :]
            dtype = kv_layer.dtype.element_ty
            # By way of float32: the only step to float8 that every version of Triton takes in one rounding.
            tl.store(key_target, first.to(tl.float32).to(dtype), mask=here)
            tl.store(key_target + half, second.to(tl.float32).to(dtype), mask=here)
            tl.store(value_target, tl.load(value, mask=here, other=0.0).to(tl.float32).to(dtype), mask=here)
            rest = tl.load(value + half, mask=here, other=0.0)
            tl.store(value_target + half, rest.to(tl.float32).to(dtype), mask=here)


def rope_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    kv_layer: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """See `kernels/ops.py`. A float8 cache gets k and v rounded to their own dtype first, as everywhere else."""
    tokens, heads, head_dim = q.shape
    _, two, block_size, kv_heads, cached_dim = kv_layer.shape
    assert k.shape == v.shape == (tokens, kv_heads, head_dim)
    assert q.dtype == k.dtype == v.dtype
    assert (two, cached_dim, table.shape[1]) == (2, head_dim, head_dim)
    assert head_dim % 2 == 0, "rotation is of pairs"
    assert q.stride(2) == k.stride(2) == v.stride(2) == table.stride(1) == 1, "the last dimension is contiguous"
    assert table.dtype == torch.float32
    assert positions.dtype == slots.dtype == torch.int64
    assert positions.shape == slots.shape == (tokens,)
    assert positions.is_contiguous()
    assert slots.is_contiguous()
    assert kv_layer.is_contiguous()
    rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return rotated
    _rope_store[(tokens, triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS))](
        q,
        k,
        v,
        positions,
        table,
        kv_layer,
        slots,
        rotated,
        heads,
        kv_heads,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        table.stride(0),
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        HEADS=HEADS,
        COLUMNS=triton.next_power_of_2(head_dim // 2),
        num_warps=WARPS,
    )
    return rotated
