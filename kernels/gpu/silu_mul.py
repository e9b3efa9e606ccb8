"""The gated activation of a feed-forward layer, silu(gate) * up (https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Two reads and a write of 8 elements per thread: 16 bytes each in bfloat16.
TILE = 1024
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _silu_mul(
    gate_up: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = column < columns
    gates = gate_up + row * row_stride
    gate = tl.load(gates + column, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gates + columns + column, mask=here, other=0.0).to(tl.float32)
    # The exponent is never positive, so it cannot overflow.
    fade = tl.exp(-tl.abs(gate))
    sigmoid = tl.where(gate >= 0, 1.0, fade) / (1.0 + fade)
    tl.store(out + row * columns + column, (gate * sigmoid * up).to(out.dtype.element_ty), mask=here)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `kernels/ops.py`. Products in float32."""
    tokens, width = gate_up.shape
    assert width % 2 == 0, "gate and up are of one size"
    assert gate_up.stride(1) == 1, "the last dimension is contiguous"
    out = torch.empty(tokens, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    grid = (tokens, triton.cdiv(width // 2, TILE))
    _silu_mul[grid](gate_up, out, width // 2, gate_up.stride(0), TILE=TILE, num_warps=WARPS)
    return out
