"""A contiguous buffer into blocks of the paged cache, wherever they start and whatever their size: where the KV stream
ends."""

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
    Config({"TILE_BYTES": 16384}, num_warps=8),
    Config({"TILE_BYTES": 32768}, num_warps=8),
    Config({"TILE_BYTES": 4096}, num_warps=4),
]
# A token's keys (or values) in one block are contiguous; longer ones than this are cut, so that a tile is never one
# row of a few threads' work nor larger than a program's share.
MAX_COLUMN_BYTES = 4096


@triton.jit(do_not_specialize=["tokens", "first_slot", "block_tokens", "column_tiles"])  # type: ignore[untyped-decorator]
def _scatter_blocks(
    blocks: tl.tensor,
    kv: tl.tensor,
    block_ids: tl.tensor,
    tokens: tl.tensor,
    first_slot: tl.tensor,
    block_tokens: tl.tensor,
    column_tiles: tl.tensor,
    row_words: tl.tensor,
    source_layer_words: tl.tensor,
    kv_layer_words: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    CASTS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A row is one token's keys or values. Tokens are 32-bit numbers (division is dear), rows and words 64-bit."""
    layer, half = (tl.program_id(1) // 2).to(tl.int64), tl.program_id(1) % 2
    token = (tl.program_id(0) // column_tiles) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    is_token = token < tokens
    place = first_slot + token
    block = tl.load(block_ids + place // BLOCK_SIZE, mask=is_token, other=0)
    target_row = (block * 2 + half) * BLOCK_SIZE + place % BLOCK_SIZE
    source_row = (token // block_tokens * 2 + half).to(tl.int64) * block_tokens + token % block_tokens
    here = is_token[:, None] & (column < row_words)[None, :]
    source = blocks + layer * source_layer_words + (source_row * row_words)[:, None] + column[None, :]
    target = kv + layer * kv_layer_words + (target_row * row_words)[:, None] + column[None, :]
    words = tl.load(source, mask=here)
    if CASTS:
        # By way of float32, which holds every value of either side.
        words = words.to(tl.float32).to(kv.dtype.element_ty)
    tl.store(target, words, mask=here)


def scatter_blocks(
    kv: torch.Tensor, block_ids: torch.Tensor, first_slot: int, layers: range, blocks: torch.Tensor
) -> None:
    """See `kernels/ops.py`. Moves bytes where the dtypes agree, whatever they are."""
    layer_count, num_blocks, two, block_size, *row_shape = kv.shape
    _, source_count, _, block_tokens, *_ = blocks.shape
    tokens = source_count * block_tokens
    assert kv.is_contiguous()
    assert block_ids.dtype == torch.int64
    assert block_ids.is_contiguous()
    assert layers.step == 1
    assert 0 <= layers.start <= layers.stop <= layer_count
    assert two == 2
    assert list(blocks.shape) == [len(layers), source_count, 2, block_tokens, *row_shape]
    assert first_slot >= 0
    assert first_slot + tokens <= len(block_ids) * block_size, "more tokens than the blocks hold"
    if blocks.numel() == 0:
        return
    row = kv[0, 0, 0, 0].numel()
    source, target = blocks.contiguous(), kv[layers.start : layers.stop]
    casts = blocks.dtype != kv.dtype
    if casts:
        source, target = source.view(-1), target.view(-1)
    else:
        source, target = as_words(source, target, run_bytes=row * kv.element_size())
    width = max(source.element_size(), target.element_size())
    row_words = row * kv.element_size() // target.element_size()

    def launch(config: Config) -> None:
        columns = min(MAX_COLUMN_BYTES // width, triton.next_power_of_2(row_words))
        tile_tokens = max(1, config.sizes["TILE_BYTES"] // width // columns)
        column_tiles = triton.cdiv(row_words, columns)
        _scatter_blocks[(triton.cdiv(tokens, tile_tokens) * column_tiles, 2 * len(layers))](
            source,
            target,
            block_ids,
            tokens,
            first_slot,
            block_tokens,
            column_tiles,
            row_words,
            2 * tokens * row_words,
            num_blocks * 2 * block_size * row_words,
            BLOCK_SIZE=block_size,
            CASTS=casts,
            TOKENS=tile_tokens,
            COLUMNS=columns,
            num_warps=config.num_warps,
        )

    key = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in (source, target))
    launch(choose("scatter_blocks", key, CANDIDATES, launch))
