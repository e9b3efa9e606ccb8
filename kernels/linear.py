"""A matrix product with fixed weights: the seam behind which number formats and packings change places."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as functional


class Linear(Protocol):
    """y = x Wᵀ + bias. `weight_bytes`: what one product reads of the weights."""

    in_features: int
    out_features: int
    weight_bytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, in_features] → [tokens, out_features], in x's dtype. x's last dimension is contiguous."""
        ...


class DenseLinear:
    """Plain torch, in the weight's own dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight_bytes = weight.numel() * weight.itemsize
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)
