"""The Triton scatter writes exactly the bytes that the reference writes, and no others."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.gpu.gather_blocks import gather_blocks
from kernels.gpu.scatter_blocks import scatter_blocks
from tests.kernels.checks import randn

FP8 = torch.float8_e4m3fn
CACHE_DTYPES = [torch.float32, torch.bfloat16, torch.float16, FP8]


def bits(x: torch.Tensor) -> torch.Tensor:
    """NaN differs from itself; its bytes do not."""
    return x.cpu().contiguous().view(-1).view(torch.uint8)


def check(
    kv: torch.Tensor, ids: torch.Tensor, first_slot: int, layers: range, blocks: torch.Tensor, device: torch.device
) -> None:
    there = kv.to(device)
    scatter_blocks(there, ids.to(device), first_slot, layers, blocks.to(device))
    expected = kv.clone()
    reference.scatter_blocks(expected, ids, first_slot, layers, blocks)
    assert torch.equal(bits(there), bits(expected))


@pytest.mark.parametrize("first_slot", [0, 1, 3, 5])
@pytest.mark.parametrize(("source_count", "block_tokens"), [(1, 1), (2, 4), (1, 3), (3, 2), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_alignment(
    first_slot: int, source_count: int, block_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    kv = torch.full((3, 6, 2, 4, 2, 5), float("nan"))
    blocks = randn(2, source_count, 2, block_tokens, 2, 5, dtype=dtype)
    check(kv, torch.tensor([4, 0, 2, 5]), first_slot, range(1, 3), blocks, device)


@pytest.mark.parametrize("cache", CACHE_DTYPES)
@pytest.mark.parametrize("sent", CACHE_DTYPES)
def test_every_cast(sent: torch.dtype, cache: torch.dtype, device: torch.device) -> None:
    kv = torch.full((2, 4, 2, 4, 2, 8), float("nan")).to(cache)
    blocks = randn(2, 2, 2, 3, 2, 8, dtype=torch.float32).to(sent)
    check(kv, torch.tensor([3, 1]), 1, range(2), blocks, device)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("block_size", "block_tokens", "first_slot"), [(16, 16, 0), (16, 16, 5), (128, 16, 32)])
def test_real_blocks_in_any_order(
    head_dim: int, block_size: int, block_tokens: int, first_slot: int, device: torch.device
) -> None:
    kv = torch.full((2, 5, 2, block_size, 8, head_dim), float("nan"), dtype=torch.bfloat16)
    blocks = randn(2, 2, 2, block_tokens, 8, head_dim, dtype=torch.bfloat16)
    check(kv, torch.tensor([3, 1, 4]), first_slot, range(2), blocks, device)


def test_rows_longer_than_a_tile(device: torch.device) -> None:
    kv = torch.zeros(1, 3, 2, 4, 20, 256, dtype=torch.float32)
    check(kv, torch.tensor([2, 0]), 2, range(1), randn(1, 2, 2, 3, 20, 256, dtype=torch.float32), device)
    check(kv.bfloat16(), torch.tensor([2, 0]), 2, range(1), randn(1, 2, 2, 3, 20, 256, dtype=torch.float32), device)


def test_nan_arrives_as_nan(device: torch.device) -> None:
    kv = torch.zeros(1, 2, 2, 4, 1, 8, dtype=FP8)
    blocks = torch.full((1, 1, 2, 4, 1, 8), float("nan"), dtype=torch.bfloat16)
    there = kv.to(device)
    scatter_blocks(there, torch.tensor([1], device=device), 0, range(1), blocks.to(device))
    assert there[0, 1].float().isnan().all()
    assert (there[0, 0].float() == 0).all()


def test_layers_of_a_larger_buffer(device: torch.device) -> None:
    """A slice of what came in: not contiguous, though its rows are."""
    kv = torch.zeros(2, 4, 2, 4, 1, 8)
    check(kv, torch.tensor([3, 1]), 0, range(2), randn(2, 4, 2, 4, 1, 8, dtype=torch.float32)[:, 1:3], device)


@pytest.mark.parametrize("block_size", [8, 16])
def test_what_one_cache_gives_another_takes(block_size: int, device: torch.device) -> None:
    """Both ends of the KV stream, with blocks of different sizes."""
    source = randn(3, 6, 2, 16, 2, 64, dtype=torch.bfloat16).to(device)
    staged = gather_blocks(source, torch.tensor([5, 2], device=device), range(3), 16)
    target = torch.zeros(3, 8, 2, block_size, 2, 64, dtype=torch.bfloat16, device=device)
    ids = torch.tensor([7, 0, 3, 4], device=device)
    scatter_blocks(target, ids, 0, range(3), staged)
    seen = target[:, ids].transpose(1, 2).reshape(3, 2, -1, 2, 64)[:, :, :32]
    sent = source[:, [5, 2]].transpose(1, 2).reshape(3, 2, 32, 2, 64)
    assert torch.equal(seen, sent)


@pytest.mark.parametrize(("count", "layers"), [(0, range(2)), (2, range(1, 1))])
def test_nothing_to_scatter(count: int, layers: range, device: torch.device) -> None:
    kv = torch.zeros(2, 3, 2, 4, 1, 8, device=device)
    blocks = torch.ones(len(layers), count, 2, 4, 1, 8, device=device)
    scatter_blocks(kv, torch.tensor([0, 1], device=device), 0, layers, blocks)
    assert (kv == 0).all()


def test_more_tokens_than_the_blocks_hold_are_refused(device: torch.device) -> None:
    kv = torch.zeros(2, 3, 2, 4, 1, 8, device=device)
    blocks = torch.zeros(2, 2, 2, 4, 1, 8, device=device)
    with pytest.raises(AssertionError, match="more tokens"):
        scatter_blocks(kv, torch.tensor([0, 1], device=device), 1, range(2), blocks)


@pytest.mark.parametrize("sent", [FP8, torch.bfloat16])
def test_offsets_beyond_32_bits(sent: torch.dtype, device: torch.device) -> None:
    # Words are single bytes here, and the third layer starts beyond 2^31. Memory that nobody touches costs nothing.
    layers, num_blocks = 3, 2**30 // (2 * 3) + 16
    kv = torch.empty(layers, num_blocks, 2, 3, 1, 1, dtype=FP8, device=device)
    ids = torch.tensor([num_blocks - 1, 0], device=device)
    blocks = randn(layers, 2, 2, 3, 1, 1, dtype=sent).to(device)
    scatter_blocks(kv, ids, 0, range(layers), blocks)
    for index, block in enumerate(ids.tolist()):
        assert torch.equal(kv[:, block].float(), blocks[:, index].to(FP8).float())
