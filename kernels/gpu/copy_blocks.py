"""Whole blocks copied inside the cache, in all layers at once: what copy-on-write owes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.tuning import Config, choose
from kernels.gpu.words import as_words

# As for gather_blocks: 16 KiB under way per program.
CANDIDATES = [
    Config({"TILE_BYTES": 16384}, num_warps=4),
    Config({"TILE_BYTES": 8192}, num_warps=4),
    Config({"TILE_BYTES": 4096}, num_warps=4),
]


@triton.jit(do_not_specialize=["tiles"])  # type: ignore[untyped-decorator]
def _copy_blocks(
    kv: tl.tensor,
    pairs: tl.tensor,
    tiles: tl.tensor,
    layer_words: tl.tensor,
    block_words: tl.tensor,
    WORDS: tl.constexpr,
) -> None:
    layer = tl.program_id(1).to(tl.int64)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    source, target = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    word = tile * WORDS + tl.arange(0, WORDS)
    here = word < block_words
    base = kv + layer * layer_words
    words = tl.load(base + source * block_words + word, mask=here)
    tl.store(base + target * block_words + word, words, mask=here)


def copy_blocks(kv: torch.Tensor, pairs: torch.Tensor) -> None:
    """See `kernels/ops.py`. Moves bytes: any dtype."""
    layer_count, num_blocks = kv.shape[:2]
    count, two = pairs.shape
    assert kv.is_contiguous()
    assert pairs.dtype == torch.int64
    assert pairs.is_contiguous()
    assert two == 2
    if count == 0 or kv.numel() == 0:
        return
    block_bytes = kv.nbytes // (layer_count * num_blocks)
    (flat,) = as_words(kv, run_bytes=block_bytes)
    width = flat.element_size()
    block_words = block_bytes // width

    def launch(config: Config) -> None:
        words = min(config.sizes["TILE_BYTES"] // width, triton.next_power_of_2(block_words))
        tiles = triton.cdiv(block_words, words)
        _copy_blocks[(tiles * count, layer_count)](
            flat, pairs, tiles, num_blocks * block_words, block_words, WORDS=words, num_warps=config.num_warps
        )

    launch(choose("copy_blocks", (width,), CANDIDATES, launch))
