"""Tensors seen as integers, for kernels that only move bytes: one compiled kernel copies every dtype."""

from __future__ import annotations

import math

import torch

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_words(*tensors: torch.Tensor, run_bytes: int) -> list[torch.Tensor]:
    """Flat views of contiguous tensors in the widest integers (1, 2, 4 or 8 bytes) that divide `run_bytes`, the length
    and the address of each. Neighbouring words become 16-byte accesses when Triton compiles.
    """
    assert all(tensor.is_contiguous() for tensor in tensors)
    width = math.gcd(8, run_bytes, *(tensor.nbytes for tensor in tensors), *(tensor.data_ptr() for tensor in tensors))
    return [tensor.view(-1).view(torch.uint8).view(_WORDS[width]) for tensor in tensors]
