"""The Triton copy moves exactly the bytes that the reference moves."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.gpu.copy_blocks import copy_blocks
from tests.kernels.checks import randn

FP8 = torch.float8_e4m3fn


def check(kv: torch.Tensor, pairs: torch.Tensor, device: torch.device) -> None:
    there = kv.to(device)
    copy_blocks(there, pairs.to(device))
    reference.copy_blocks(kv, pairs)
    got, expected = (x.cpu().view(-1).view(torch.uint8) for x in (there, kv))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FP8])
@pytest.mark.parametrize("row", [(1, 1), (3, 5), (1, 64), (2, 80)])
def test_one_source_may_have_several_targets(row: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    kv = randn(3, 6, 2, 3, *row, dtype=torch.float32).to(dtype)
    # Unused blocks hold NaN and stay as they are, bit for bit.
    kv[:, 3] = float("nan")
    check(kv, torch.tensor([[0, 1], [0, 2], [5, 4]]), device)


def test_blocks_of_several_tiles(device: torch.device) -> None:
    check(randn(2, 3, 2, 16, 5, 256, dtype=torch.float32), torch.tensor([[2, 0]]), device)


def test_nothing_to_copy(device: torch.device) -> None:
    kv = torch.ones(2, 3, 2, 4, 1, 8, device=device)
    copy_blocks(kv, torch.empty(0, 2, dtype=torch.int64, device=device))
    assert (kv == 1).all()


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    # Words are single bytes here, and the third layer starts beyond 2^31. Memory that nobody touches costs nothing.
    layers, num_blocks = 3, 2**30 // 3 + 16
    kv = torch.empty(layers, num_blocks, 3, dtype=FP8, device=device)
    values = randn(layers, 2, 3, dtype=torch.float32).to(device).to(FP8)
    kv[:, 0], kv[:, num_blocks - 1] = values[:, 0], values[:, 1]
    copy_blocks(kv, torch.tensor([[0, num_blocks - 2], [num_blocks - 1, 1]], device=device))
    assert torch.equal(kv[:, num_blocks - 2].float(), values[:, 0].float())
    assert torch.equal(kv[:, 1].float(), values[:, 1].float())
