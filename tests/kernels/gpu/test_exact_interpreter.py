"""Casts and matrix products are the same under the interpreter, on a GPU and in torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.checks import randn

TILE = 8192
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@triton.jit
def _cast(x, out, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + place, tl.load(x + place).to(tl.float32).to(out.dtype.element_ty))


@triton.jit
def _multiply(x, y, out, SIDE: tl.constexpr):
    places = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tl.store(out + places, tl.dot(tl.load(x + places), tl.load(y + places), input_precision="ieee"))


def finite_values(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a narrow dtype; of float32 those around the ties of bfloat16, and random ones. At most 448."""
    if dtype == torch.float32:
        ties = (torch.arange(2**16, dtype=torch.int32) << 16) | 0x8000
        values = torch.cat([(ties + step).view(torch.float32) for step in (0, 1)] + [randn(TILE, dtype=dtype)])
    elif dtype.itemsize == 2:
        values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    else:
        values = torch.arange(2**8).to(torch.uint8).view(dtype)
    values = values.float()
    # Beyond the smallest normal numbers a GPU may round to zero.
    is_wanted = (values.abs() <= 448) & ((values == 0) | (values.abs() > 2**-120))
    values = values[is_wanted]
    return torch.cat((values, torch.zeros(-len(values) % TILE))).to(dtype)


@pytest.mark.parametrize(
    ("source", "target"),
    [(torch.float32, other) for other in FLOATS[1:]]
    + [(other, torch.float32) for other in FLOATS[1:]]
    + [(torch.bfloat16, torch.float16), (torch.bfloat16, torch.float8_e4m3fn)],
)
def test_casts(source: torch.dtype, target: torch.dtype, device: torch.device) -> None:
    x = finite_values(source)
    out = torch.empty(len(x), dtype=target, device=device)
    _cast[(len(x) // TILE,)](x.to(device), out, TILE=TILE)
    assert torch.equal(out.cpu().float(), x.float().to(target).float())


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_stays_nan(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.full((TILE,), float("nan"))
    out = torch.zeros(TILE, dtype=dtype, device=device)
    _cast[(1,)](x.to(device), out, TILE=TILE)
    again = torch.zeros(TILE, device=device)
    _cast[(1,)](out, again, TILE=TILE)
    assert out.cpu().float().isnan().all()
    assert again.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_matrices(dtype: torch.dtype, device: torch.device) -> None:
    x, y = randn(32, 32, dtype=dtype), randn(32, 32, dtype=dtype, seed=1)
    out = torch.empty(32, 32, device=device)
    _multiply[(1,)](x.to(device), y.to(device), out, SIDE=32)
    truth = x.double() @ y.double()
    scale = (x.double().abs() @ y.double().abs()).max()
    assert (out.cpu().double() - truth).abs().max() <= 32 * torch.finfo(torch.float32).eps * scale
