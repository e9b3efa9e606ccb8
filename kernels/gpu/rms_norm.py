"""Root mean square norm (https://arxiv.org/abs/1910.07467), with the residual added in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A row lives in one program's registers: read once, written once.
MAX_ROW = 16384
# Elements of a tile: short rows (the norm of single heads) share a program until they fill it.
MIN_TILE = 1024
# 16 elements per thread are two 16-byte accesses of bfloat16. Longer rows get 16 warps and more elements each.
ELEMENTS_PER_WARP = 512
MAX_WARPS = 16


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _rms_norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    summed: tl.tensor,
    rows: tl.tensor,
    inner_rows: tl.tensor,
    columns: tl.tensor,
    x_outer_stride: tl.tensor,
    x_inner_stride: tl.tensor,
    residual_outer_stride: tl.tensor,
    residual_inner_stride: tl.tensor,
    eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    outer, inner = row // inner_rows, row % inner_rows
    flat = (row * columns)[:, None] + column[None, :]
    places = (outer * x_outer_stride + inner * x_inner_stride)[:, None] + column[None, :]
    values = tl.load(x + places, mask=here, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        places = (outer * residual_outer_stride + inner * residual_inner_stride)[:, None] + column[None, :]
        values += tl.load(residual + places, mask=here, other=0.0).to(tl.float32)
        rounded = values.to(summed.dtype.element_ty)
        tl.store(summed + flat, rounded, mask=here)
        # The norm is of the sum that later layers will read, as when the two are computed apart.
        values = rounded.to(tl.float32)
    total = tl.sum(values * values, axis=1)
    # Correctly rounded where it is free, once per row; per element only where float32 is asked for.
    root = tl.sqrt_rn(tl.div_rn(total, tl.zeros_like(total) + columns) + eps)[:, None]
    scaled = tl.div_rn(values, root) if x.dtype.element_ty == tl.float32 else values * (1.0 / root)
    weights = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    result = scaled * weights[None, :]
    tl.store(normed + flat, result.to(normed.dtype.element_ty), mask=here)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels/ops.py`. Rows of up to 16,384 elements; sums in float32."""
    columns = x.shape[-1]
    assert columns <= MAX_ROW, f"a row of {columns} does not fit one program"
    assert weight.shape == (columns,)
    assert weight.is_contiguous()
    assert weight.dtype == x.dtype
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(normed)
    if x.numel() == 0:
        return normed, summed
    rows, rows_of_residual = _as_three(x), _as_three(x if residual is None else residual)
    tile_columns = triton.next_power_of_2(columns)
    tile_rows = max(1, MIN_TILE // tile_columns)
    row_count = rows.shape[0] * rows.shape[1]
    _rms_norm[(triton.cdiv(row_count, tile_rows),)](
        rows,
        rows_of_residual,
        weight,
        normed,
        summed,
        row_count,
        rows.shape[1],
        columns,
        rows.stride(0),
        rows.stride(1),
        rows_of_residual.stride(0),
        rows_of_residual.stride(1),
        eps,
        HAS_RESIDUAL=residual is not None,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=min(MAX_WARPS, max(1, tile_rows * tile_columns // ELEMENTS_PER_WARP)),
    )
    return normed, summed


def _as_three(x: torch.Tensor) -> torch.Tensor:
    """[outer, inner, n] without a copy for up to three dimensions: heads in a fused projection keep their strides."""
    if x.dim() > 3:
        x = x.reshape(-1, 1, x.shape[-1])
    while x.dim() < 3:
        x = x.unsqueeze(-2) if x.dim() == 2 else x.unsqueeze(0)
    assert x.stride(2) == 1 or x.shape[2] == 1, "the last dimension is contiguous"
    return x
