"""Weights of GGUF's own formats come back from `quantise` as they were."""

from __future__ import annotations

import pytest
import torch

from kernels.quantise import GROUP, IntegerFormat, quantise

ROWS, GROUPS = 24, 7


def halves(low: float, high: float, seed: int) -> torch.Tensor:
    """[ROWS, GROUPS] numbers that float16 holds, as float32."""
    uniform = torch.rand((ROWS, GROUPS), generator=torch.Generator().manual_seed(seed))
    return (low + (high - low) * uniform).half().float()


def whole_numbers(low: int, high: int) -> torch.Tensor:
    """[ROWS, GROUPS, GROUP], with both ends in every group."""
    shape = (ROWS, GROUPS, GROUP)
    numbers = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(3))
    numbers[..., 5], numbers[..., 17] = low, high
    return numbers


def test_q4_1_comes_back_exactly() -> None:
    scales, minima, values = halves(0.001, 0.02, 1), halves(-0.2, 0.05, 2), whole_numbers(0, 15)
    weight = (values * scales[..., None] + minima[..., None]).flatten(1)
    quantised = quantise(weight, "int4")
    assert quantised.is_half
    assert torch.equal(quantised.scales, scales)
    assert torch.equal(quantised.minima, minima)
    assert torch.equal(quantised.values, values.byte())
    assert torch.equal(quantised.dequantise(), weight)


def test_q8_0_comes_back_exactly() -> None:
    scales, values = halves(0.0001, 0.002, 1), whole_numbers(-127, 127)
    weight = (values * scales[..., None]).flatten(1)
    quantised = quantise(weight, "int8")
    assert quantised.is_half
    assert torch.equal(quantised.scales, scales)
    assert torch.equal(quantised.values, (values + 128).byte())
    assert torch.equal(quantised.dequantise(), weight)


@pytest.mark.parametrize(("weight_format", "steps"), [("int8", 254), ("int4", 15)])
@pytest.mark.parametrize("in_features", [1, 31, 64, 100])
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e7])
def test_no_weight_moves_further_than_half_a_step(
    weight_format: IntegerFormat, steps: int, in_features: int, size: float
) -> None:
    weight = torch.randn((50, in_features), generator=torch.Generator().manual_seed(1)) * size
    quantised = quantise(weight, weight_format)
    # float16's range ends at 65504, and its precision at 6e-8: float32 scales beyond.
    assert quantised.is_half == (size == 1)
    largest = weight.abs().amax()
    half_step = (2 * largest if weight_format == "int8" else largest - weight.min()) / steps / 2
    # Rounding scale and minimum to 11 bits moves the ends of a group's range by that part of it.
    allowed = half_step + largest * 2**-10
    assert (quantised.dequantise() - weight).abs().max() <= allowed
