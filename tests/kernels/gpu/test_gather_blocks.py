"""The Triton gather moves exactly the bytes that the reference moves."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.gpu.gather_blocks import gather_blocks
from tests.kernels.checks import randn

FP8 = torch.float8_e4m3fn


def bits(x: torch.Tensor) -> torch.Tensor:
    """NaN differs from itself; its bytes do not."""
    return x.cpu().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FP8])
@pytest.mark.parametrize("block_tokens", [1, 3, 4])
@pytest.mark.parametrize("layers", [range(3), range(1, 2)])
def test_rows_of_any_length(block_tokens: int, layers: range, dtype: torch.dtype, device: torch.device) -> None:
    kv = randn(3, 6, 2, 4, 3, 5, dtype=torch.float32).to(dtype)
    # Tokens that nobody asks for hold NaN, and every second block does throughout.
    kv[:, :, :, block_tokens:] = float("nan")
    kv[:, 1::2] = float("nan")
    ids = torch.tensor([4, 0, 4, 2])
    got = gather_blocks(kv.to(device), ids.to(device), layers, block_tokens)
    assert got.is_contiguous()
    assert got.shape == (len(layers), 4, 2, block_tokens, 3, 5)
    assert torch.equal(bits(got), bits(reference.gather_blocks(kv, ids, layers, block_tokens)))
    assert not got.float().isnan().any()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("block_size", "block_tokens"), [(16, 16), (16, 7), (128, 128), (128, 16)])
def test_real_blocks_in_any_order(head_dim: int, block_size: int, block_tokens: int, device: torch.device) -> None:
    kv = randn(2, 5, 2, block_size, 2, head_dim, dtype=torch.bfloat16)
    ids = torch.tensor([3, 1, 4])
    got = gather_blocks(kv.to(device), ids.to(device), range(2), block_tokens)
    assert torch.equal(got.cpu(), reference.gather_blocks(kv, ids, range(2), block_tokens))


def test_a_cache_at_an_odd_address(device: torch.device) -> None:
    """A word must not be wider than the address allows."""
    flat = randn(1 + 2 * 3 * 2 * 4 * 8, dtype=torch.bfloat16)
    ids = torch.tensor([2, 0])
    got = gather_blocks(flat.to(device)[1:].view(2, 3, 2, 4, 1, 8), ids.to(device), range(2), 3)
    assert torch.equal(got.cpu(), reference.gather_blocks(flat[1:].view(2, 3, 2, 4, 1, 8), ids, range(2), 3))


@pytest.mark.parametrize(("count", "layers"), [(0, range(2)), (2, range(1, 1))])
def test_nothing_to_gather(count: int, layers: range, device: torch.device) -> None:
    kv = torch.zeros(2, 3, 2, 4, 1, 8, dtype=torch.bfloat16, device=device)
    ids = torch.zeros(count, dtype=torch.int64, device=device)
    assert gather_blocks(kv, ids, layers, 4).shape == (len(layers), count, 2, 4, 1, 8)


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    # Words are single bytes here, and the third layer starts beyond 2^31. Memory that nobody touches costs nothing.
    layers, num_blocks = 3, 2**30 // (2 * 3) + 16
    kv = torch.empty(layers, num_blocks, 2, 3, 1, 1, dtype=FP8, device=device)
    ids = torch.tensor([num_blocks - 1, 0], device=device)
    for layer in range(layers):
        kv[layer, ids] = torch.full((2, 3, 1, 1), float(layer + 1), device=device).to(FP8).expand(2, 2, 3, 1, 1)
    for tokens in (3, 2):
        got = gather_blocks(kv, ids, range(layers), tokens)
        assert got.float().amin(dim=(1, 2, 3, 4, 5)).tolist() == [1, 2, 3]
        assert got.float().amax(dim=(1, 2, 3, 4, 5)).tolist() == [1, 2, 3]


def test_more_tokens_than_a_block_has_are_refused(device: torch.device) -> None:
    kv = torch.zeros(2, 3, 2, 4, 1, 8, device=device)
    with pytest.raises(AssertionError):
        gather_blocks(kv, torch.zeros(1, dtype=torch.int64, device=device), range(2), 5)
