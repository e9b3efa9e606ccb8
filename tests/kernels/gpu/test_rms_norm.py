"""The Triton RMS norm: error to float64 at most twice that of the reference in the same dtype."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.gpu.rms_norm import rms_norm
from tests.kernels.checks import DTYPES, assert_at_most_twice_the_error, randn


def check(x: torch.Tensor, residual: torch.Tensor | None, device: torch.device) -> None:
    """Moves views as views: strides stay what they are."""
    weight = randn(x.shape[-1], dtype=x.dtype, seed=1)
    before = x.clone()
    there = None if residual is None else move(residual, device)
    got = rms_norm(x_there := move(x, device), weight.to(device), 1e-5, there)
    same = reference.rms_norm(x, weight, 1e-5, residual)
    truth = reference.rms_norm(x.double(), weight.double(), 1e-5, None if residual is None else residual.double())
    for index in range(2):
        assert_at_most_twice_the_error(got[index], same[index], truth[index])
    assert got[0].is_contiguous()
    assert torch.equal(x_there.cpu(), before), "the input is the caller's"
    if residual is None:
        assert got[1] is x_there


def move(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(device)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 64), (5, 123), (3, 576), (7, 3, 80), (2, 4096), (1, 5120), (2, 16384), (2, 3, 4, 22), (576,)]
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_odd_shapes(shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool, device: torch.device) -> None:
    x = randn(*shape, dtype=dtype)
    check(x, randn(*shape, dtype=dtype, seed=2) if with_residual else None, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_heads_inside_a_fused_projection(dtype: torch.dtype, with_residual: bool, device: torch.device) -> None:
    """As q and k are normed where a model norms heads: three dimensions, none mergeable."""
    x = randn(5, 12, 80, dtype=dtype)[:, 2:9]
    residual = randn(5, 9, 96, dtype=dtype, seed=2)[:, 1:8, 8:88]
    check(x, residual if with_residual else None, device)


def test_rows_of_a_wider_tensor_and_every_other_row(device: torch.device) -> None:
    check(randn(9, 200, dtype=torch.bfloat16)[::2, 10:133], randn(5, 123, dtype=torch.bfloat16, seed=2), device)


def test_the_norm_is_of_the_sum_as_stored(device: torch.device) -> None:
    """bfloat16(1 + 2^-9) is 1: a norm of the exact sum would differ from what the next layer sees."""
    x = torch.full((1, 64), 1.0, dtype=torch.bfloat16, device=device)
    residual = torch.full((1, 64), 2.0**-9, dtype=torch.bfloat16, device=device)
    weight = torch.ones(64, dtype=torch.bfloat16, device=device)
    normed, summed = rms_norm(x, weight, 1e-12, residual)
    assert (summed == 1).all()
    assert (normed == 1).all()


def test_large_values_do_not_overflow_float16(device: torch.device) -> None:
    x = randn(3, 256, dtype=torch.float16) * 1e4
    normed, _ = rms_norm(x.to(device), torch.ones(256, dtype=torch.float16, device=device), 1e-5)
    truth = reference.rms_norm(x.double(), torch.ones(256).double(), 1e-5)[0]
    assert (normed.cpu().double() - truth).abs().max() <= torch.finfo(torch.float16).eps * truth.abs().max()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)])
def test_no_tokens(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    normed, summed = rms_norm(x, torch.ones(64, dtype=torch.bfloat16, device=device), 1e-5, x)
    assert normed.shape == summed.shape == shape


def test_too_long_a_row_is_refused(device: torch.device) -> None:
    x = torch.empty(1, 16385, device=device)
    with pytest.raises(AssertionError, match="does not fit"):
        rms_norm(x, torch.empty(16385, device=device), 1e-5)


def test_rows_further_apart_than_32_bits(device: torch.device) -> None:
    # Memory that nobody touches is only an address range.
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x = torch.as_strided(far, (3, 64), (2**30, 1))
    x.copy_(randn(3, 64, dtype=torch.float16))
    weight = torch.ones(64, dtype=torch.float16, device=device)
    assert torch.equal(rms_norm(x, weight, 1e-5)[0], rms_norm(x.clone(), weight, 1e-5)[0])
