"""Blocks of the paged cache into one contiguous buffer: where the KV stream starts."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.gpu.tuning import Config, choose
from kernels.gpu.words import as_words

# Enough bytes under way to hide memory's latency: 16 KiB per program, that is eight 16-byte loads for each thread of
# 4 warps. Programs are small and many, so that an export of a few layers fills every multiprocessor too.
CANDIDATES = [
    Config({"TILE_BYTES": 16384}, num_warps=4),
    Config({"TILE_BYTES": 8192}, num_warps=4),
    Config({"TILE_BYTES": 16384}, num_warps=8),
    Config({"TILE_BYTES": 32768}, num_warps=8),
    Config({"TILE_BYTES": 4096}, num_warps=4),
]


@triton.jit(do_not_specialize=["runs", "halves", "tiles"])  # type: ignore[untyped-decorator]
def _gather_blocks(
    kv: tl.tensor,
    block_ids: tl.tensor,
    out: tl.tensor,
    runs: tl.tensor,
    halves: tl.tensor,
    tiles: tl.tensor,
    run_words: tl.tensor,
    layer_words: tl.tensor,
    block_words: tl.tensor,
    half_words: tl.tensor,
    WORDS: tl.constexpr,
) -> None:
    """A run is what one block gives in one piece: its keys or its values, or both where the whole block is wanted."""
    layer = tl.program_id(1).to(tl.int64)
    run, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    block = tl.load(block_ids + run // halves)
    word = tile * WORDS + tl.arange(0, WORDS)
    here = word < run_words
    source = kv + layer * layer_words + block * block_words + (run % halves) * half_words
    target = out + (layer * runs + run) * run_words
    tl.store(target + word, tl.load(source + word, mask=here), mask=here)


def gather_blocks(kv: torch.Tensor, block_ids: torch.Tensor, layers: range, block_tokens: int) -> torch.Tensor:
    """See `kernels/ops.py`. Moves bytes: any dtype."""
    layer_count, num_blocks, two, block_size, kv_heads, head_dim = kv.shape
    assert kv.is_contiguous()
    assert two == 2
    assert block_ids.dtype == torch.int64
    assert block_ids.is_contiguous()
    assert layers.step == 1
    assert 0 <= layers.start <= layers.stop <= layer_count
    assert 0 < block_tokens <= block_size
    count = len(block_ids)
    out = torch.empty(len(layers), count, 2, block_tokens, kv_heads, head_dim, dtype=kv.dtype, device=kv.device)
    if out.numel() == 0:
        return out
    half_bytes = kv.nbytes // (layer_count * num_blocks * 2)
    halves = 1 if block_tokens == block_size else 2
    run_bytes = out.nbytes // (len(layers) * count * halves)
    # Runs start at multiples of half_bytes in the cache, and of run_bytes in the buffer.
    source, target = as_words(kv[layers.start : layers.stop], out, run_bytes=math.gcd(half_bytes, run_bytes))
    width = source.element_size()
    run_words = run_bytes // width

    def launch(config: Config) -> None:
        words = min(config.sizes["TILE_BYTES"] // width, triton.next_power_of_2(run_words))
        tiles = triton.cdiv(run_words, words)
        _gather_blocks[(tiles * count * halves, len(layers))](
            source,
            block_ids,
            target,
            count * halves,
            halves,
            tiles,
            run_words,
            num_blocks * 2 * half_bytes // width,
            2 * half_bytes // width,
            half_bytes // width,
            WORDS=words,
            num_warps=config.num_warps,
        )

    launch(choose("gather_blocks", (width,), CANDIDATES, launch))
    return out
