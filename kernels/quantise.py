"""Weights as small integers: groups of 32 along the input features share a scale.

    int8    w = scale * (u - 128), u in 1..255: symmetric, as in GGUF's Q8_0
    int4    w = scale * u + minimum, u in 0..15: affine, as in GGUF's Q4_1

Weights that were dequantised from those two come back exactly: their groups' extremes give the same scale and minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as functional

GROUP = 32

IntegerFormat = Literal["int8", "int4"]


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """`values` uint8 [out_features, groups, GROUP], `scales` and `minima` float32 [out_features, groups].

    Input features past `in_features` are padding. `is_half`: scales, and int4's minima, are float16 numbers.
    """

    weight_format: IntegerFormat
    in_features: int
    values: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor
    is_half: bool

    def dequantise(self) -> torch.Tensor:
        """[out_features, in_features] float32."""
        dense = self.values * self.scales[..., None] + self.minima[..., None]
        return dense.flatten(1)[:, : self.in_features]


def quantise(weight: torch.Tensor, weight_format: IntegerFormat) -> QuantisedWeight:
    """Rounds weight [out_features, in_features] to the nearest that the format holds.

    Scales and minima are rounded to float16 first, unless that would cost precision: where they leave its range.
    """
    out_features, in_features = weight.shape
    # Padding repeats the last column, so that it stretches no group's range.
    padding = -in_features % GROUP
    groups = functional.pad(weight.detach().float()[None], (0, padding), mode="replicate")[0]
    groups = groups.view(out_features, -1, GROUP)
    if weight_format == "int8":
        scales, minima = groups.abs().amax(-1) / 127, torch.zeros(groups.shape[:2])
    else:
        minima = groups.amin(-1)
        scales = (groups.amax(-1) - minima) / 15
    half_scales, half_minima = scales.half().float(), minima.half().float()
    is_half = _is_close(half_scales, scales, scales) and _is_close(half_minima, minima, scales)
    if is_half:
        scales, minima = half_scales, half_minima
    inverse = torch.where(scales > 0, 1 / scales, 0)
    values = ((groups - minima[..., None]) * inverse[..., None]).round_()
    if weight_format == "int8":
        values, minima = values.clamp_(-127, 127).add_(128), -128 * scales
    else:
        values = values.clamp_(0, 15)
    return QuantisedWeight(weight_format, in_features, values.byte(), scales, minima, is_half)


def _is_close(rounded: torch.Tensor, exact: torch.Tensor, scales: torch.Tensor) -> bool:
    """Within float16's relative precision, or far below a step of the weight's largest group."""
    allowed = exact.abs() * 2**-11 + scales.amax() * 2**-14
    return bool(((rounded - exact).abs() <= allowed).all())
