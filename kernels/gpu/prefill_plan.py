"""What the host decides for prefill attention: which tiles of queries there are, in which order, and their sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kernels.attention_batch import AttentionBatch
from kernels.gpu.tuning import Config

# tl.dot's smallest side.
DOT_SIDE_MIN = 16


def work_list(batch: AttentionBatch, rows: Sequence[int], tile_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, first of its new tokens) of each tile of at most `tile_tokens`, int32 [tiles] each.

    The row of the longest context comes first, in each row the last tile: short tiles fill the end, and what runs at
    one time shares its row's K and V in the L2 cache.
    """
    ordered = sorted(rows, key=lambda row: -batch.spans[row].context)
    starts = [np.arange(0, batch.spans[row].query_count, tile_tokens, dtype=np.int32)[::-1] for row in ordered]
    tile_rows = np.repeat(np.array(ordered, dtype=np.int32), [len(tiles) for tiles in starts])
    device = batch.query_starts.device
    return torch.from_numpy(tile_rows).to(device), torch.from_numpy(np.concatenate(starts)).to(device)


def candidates(head_dim: int, dtype: torch.dtype, group: int, tokens_max: int) -> list[Config]:
    """What tuning tries, for queries of `dtype` and at most `tokens_max` new tokens a row. Not yet measured.

    The first is the guess that stands until a device has been tuned. For bfloat16 and head_dim 128 it is one program of
    two warpgroups on an SM: 32 KB of queries and 3 stages of 64 KB, 224 of 227 KB of shared memory. Of 2,048 cycles
    that the tensor cores need for a tile of 128 keys, the two warps of a scheduler issue 1,310 (Triton 3.6).
    """
    if dtype == torch.float32:
        # No tensor core multiplies float32 exactly: plain arithmetic, which tests use, with small tiles.
        sizes = [(32, 32, 8, 1)] if head_dim <= 128 else [(16, 16, 8, 1)]
    elif head_dim > 128:
        sizes = [(128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)]
    else:
        sizes = [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2)]
    needed = max(DOT_SIDE_MIN, 1 << (tokens_max * group - 1).bit_length())
    fitting = [size for size in sizes if size[0] <= needed]
    if not fitting:
        # A handful of queries waits for memory, not for the tensor cores.
        fitting = [(needed, keys, warps, stages) for _, keys, warps, stages in sizes if keys <= 64]
    return [
        Config({"TILE_ROWS": tile_rows, "TILE_KEYS": tile_keys}, num_warps=warps, num_stages=stages)
        for tile_rows, tile_keys, warps, stages in fitting
    ]
