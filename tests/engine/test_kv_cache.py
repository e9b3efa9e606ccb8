"""KV bytes out of one cache and into another, of other block sizes and dtypes; and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.batch import KVLayout
from engine.errors import ConfigError, TransferFailed
from engine.kv_cache import DTYPES, KVCache, count_blocks
from engine.model_config import from_hf
from kernels import torch_ops

# Eight bits do not hold a stamp; tests/engine/test_float8_kv.py has that dtype.
STAMPABLE = [name for name in DTYPES if name != "float8_e4m3"]
CPU = torch.device("cpu")
LAYOUT = KVLayout("m", num_layers=3, num_kv_heads=2, head_dim=5, dtype="float32", block_size=4, num_blocks=8)
LAYERS = range(1, 3)


def stamped(layout: KVLayout, first_token: int, block_ids: list[int], tokens: int) -> KVCache:
    """A cache whose `tokens` in `block_ids` hold numbers that say layer, half, token, head and element."""
    cache = KVCache(layout, CPU, torch_ops)
    cache.tensor.fill_(-1)
    for index in range(tokens):
        block, slot = block_ids[index // layout.block_size], index % layout.block_size
        cache.tensor[:, block, :, slot] = stamp(layout, first_token + index)
    return cache


def stamp(layout: KVLayout, token: int) -> torch.Tensor:
    """[layers, 2, heads, head_dim], small whole numbers: every dtype holds them exactly."""
    numbers = torch.arange(layout.num_layers * 2 * layout.num_kv_heads * layout.head_dim)
    shape = (layout.num_layers, 2, layout.num_kv_heads, layout.head_dim)
    return ((numbers + 7 * token) % 127).reshape(shape).to(DTYPES[layout.dtype])


@pytest.mark.parametrize("dtype", STAMPABLE)
@pytest.mark.parametrize("target_dtype", STAMPABLE)
@pytest.mark.parametrize("target_block", [1, 3, 4, 16])
def test_whole_blocks_arrive_in_other_layouts(dtype: str, target_dtype: str, target_block: int) -> None:
    source = stamped(replace(LAYOUT, dtype=dtype), 0, [5, 0, 3], 12)
    payload = source.export_blocks([5, 0, 3], LAYERS, 4)
    assert len(payload) == 2 * 3 * 2 * 4 * 2 * 5 * DTYPES[dtype].itemsize
    target_layout = replace(LAYOUT, dtype=target_dtype, block_size=target_block, num_blocks=16)
    # The first 2 tokens are there already, so the payload starts in the middle of some block.
    ids = list(reversed(range(1, 1 + -(-14 // target_block))))
    target = KVCache(target_layout, CPU, torch_ops)
    target.tensor.fill_(-1)
    start = 2
    target.import_blocks(ids[start // target_block :], start % target_block, LAYERS, 4, memoryview(payload), dtype)
    expected = torch.full_like(target.tensor, -1)
    for token in range(12):
        place = start + token
        expected[1:3, ids[place // target_block], :, place % target_block] = stamp(target_layout, token)[1:3]
    assert torch.equal(target.tensor, expected)


def test_a_tail_block_travels_without_its_unused_slots() -> None:
    source = stamped(LAYOUT, 0, [2], 3)
    payload = bytes(source.export_blocks([2], LAYERS, 3))
    target = KVCache(LAYOUT, CPU, torch_ops)
    target.tensor.fill_(-1)
    target.import_blocks([6], 0, LAYERS, 3, memoryview(payload), "float32")
    expected = torch.full_like(target.tensor, -1)
    expected[1:3, 6] = source.tensor[1:3, 2]
    assert torch.equal(target.tensor, expected)


def test_the_export_is_a_copy() -> None:
    source = stamped(LAYOUT, 0, [2], 4)
    payload = source.export_blocks([2], range(3), 4)
    before = bytes(payload)
    source.tensor.fill_(9)
    assert bytes(payload) == before


def test_bits_survive_even_where_numbers_would_not() -> None:
    layout = replace(LAYOUT, dtype="bfloat16")
    source, target = KVCache(layout, CPU, torch_ops), KVCache(layout, CPU, torch_ops)
    bits = torch.randint(-(1 << 15), 1 << 15, source.tensor.shape, generator=torch.Generator().manual_seed(0))
    source.tensor.copy_(bits.to(torch.int16).view(torch.bfloat16))
    target.import_blocks(range(8), 0, range(3), 4, memoryview(source.export_blocks(range(8), range(3), 4)), "bfloat16")
    assert torch.equal(target.tensor.view(torch.int16), source.tensor.view(torch.int16)), "NaNs among them"


@pytest.mark.parametrize("size_change", [-1, 1, -4 * 2 * 2 * 5 * 4])
def test_a_payload_of_the_wrong_size_is_refused_and_writes_nothing(size_change: int) -> None:
    payload = bytes(KVCache(LAYOUT, CPU, torch_ops).export_blocks([1, 2], LAYERS, 4))
    wrong = (payload + b"\0" * 9)[: len(payload) + size_change]
    target = KVCache(LAYOUT, CPU, torch_ops)
    target.tensor.fill_(-1)
    with pytest.raises(TransferFailed, match=f"KV payload of {len(wrong)} bytes is not whole blocks of 640 bytes"):
        target.import_blocks([1, 2], 0, LAYERS, 4, memoryview(wrong), "float32")
    assert (target.tensor == -1).all()


def test_a_payload_that_does_not_fit_or_is_empty_or_of_unknown_dtype_is_refused() -> None:
    payload = KVCache(LAYOUT, CPU, torch_ops).export_blocks([1, 2], LAYERS, 4)
    target = KVCache(LAYOUT, CPU, torch_ops)
    with pytest.raises(TransferFailed, match="8 tokens, but room for 7"):
        target.import_blocks([1, 2], 1, LAYERS, 4, memoryview(payload), "float32")
    with pytest.raises(TransferFailed, match="0 bytes is not whole blocks"):
        target.import_blocks([1], 0, LAYERS, 4, memoryview(b""), "float32")
    with pytest.raises(TransferFailed, match="KV of dtype 'int8' cannot be read; known: float32, bfloat16"):
        target.import_blocks([1, 2], 0, LAYERS, 4, memoryview(payload), "int8")


def test_a_block_is_one_run_of_memory() -> None:
    tensor = KVCache(LAYOUT, CPU, torch_ops).tensor
    assert tensor[1, 3].is_contiguous()
    assert tensor[1, 3].data_ptr() - tensor[1, 2].data_ptr() == tensor[1, 3].nbytes


def test_blocks_follow_from_memory() -> None:
    config = from_hf(
        {
            "model_type": "llama",
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
        },
        "smollm2",
    )
    block_bytes = 30 * 2 * 16 * 3 * 64 * 4
    assert count_blocks(config, 512 << 20, 16, "float32") == (512 << 20) // block_bytes
    assert count_blocks(config, 512 << 20, 16, "bfloat16") == 2 * (512 << 20) // block_bytes
    with pytest.raises(
        ConfigError, match=f"kv_cache_bytes: got 1000, expected at least {block_bytes} .one block of 16"
    ):
        count_blocks(config, 1000, 16, "float32")


def test_memory_that_is_not_there_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_bytes: \d+ bytes cannot be had on cpu"):
        KVCache(replace(LAYOUT, num_blocks=1 << 50), CPU, torch_ops)
