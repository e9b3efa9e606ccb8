"""The Triton silu(gate) * up: error to float64 at most twice that of the reference in the same dtype."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.gpu.silu_mul import silu_mul
from tests.kernels.checks import DTYPES, assert_at_most_twice_the_error, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 246), (3, 2048), (2, 2050), (4, 3072), (1, 10240)])
def test_odd_shapes(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = randn(*shape, dtype=dtype) * 4
    got = silu_mul(x.to(device))
    assert got.is_contiguous()
    assert_at_most_twice_the_error(got, reference.silu_mul(x), reference.silu_mul(x.double()))


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    wide = randn(9, 300, dtype=torch.bfloat16)
    x = wide[::2, 10:256]
    got = silu_mul(wide.to(device)[::2, 10:256])
    assert_at_most_twice_the_error(got, reference.silu_mul(x), reference.silu_mul(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_far_from_zero(dtype: torch.dtype, device: torch.device) -> None:
    gates = torch.tensor([-6e4, -1000.0, -100.0, -20.0, 0.0, 20.0, 1000.0, 6e4], dtype=dtype)
    x = torch.cat((gates, torch.ones(8, dtype=dtype)))[None]
    got = silu_mul(x.to(device)).cpu()
    truth = gates.double() * torch.sigmoid(gates.double())
    assert torch.allclose(
        got[0].double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-30 if dtype != torch.float16 else 6e-8
    )


def test_no_tokens(device: torch.device) -> None:
    assert silu_mul(torch.empty(0, 64, dtype=torch.bfloat16, device=device)).shape == (0, 32)


def test_rows_further_apart_than_32_bits(device: torch.device) -> None:
    # Memory that nobody touches is only an address range.
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x = torch.as_strided(far, (3, 64), (2**30, 1))
    x.copy_(randn(3, 64, dtype=torch.float16))
    assert torch.equal(silu_mul(x), silu_mul(x.clone()))
