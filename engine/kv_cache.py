"""The memory behind the block pool: one tensor for all layers, and the raw bytes that leave and enter it.

    [num_layers, num_blocks, 2, block_size, kv_heads, head_dim]        K at index 0 of the third dimension, V at 1

so a (layer, block) is one contiguous run of memory. The tensor is not zeroed at the start: nothing reads a slot before
it is written (tests fill it with NaN to prove that), and untouched pages cost no memory until they are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from engine.batch import KVLayout
from engine.errors import ConfigError, TransferFailed
from engine.kv_staging import KVStaging
from engine.model_config import ModelConfig
from kernels.cpu.huge_pages import advise_huge_pages
from kernels.ops import Ops

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
}


def count_blocks(config: ModelConfig, kv_cache_bytes: int, block_size: int, dtype: str) -> int:
    """How many blocks fit into `kv_cache_bytes`. Raises ConfigError when not even one does."""
    block_bytes = config.num_layers * 2 * block_size * config.num_kv_heads * config.head_dim * DTYPES[dtype].itemsize
    if kv_cache_bytes < block_bytes:
        raise ConfigError(
            f"kv_cache_bytes: got {kv_cache_bytes}, expected at least {block_bytes} "
            f"(one block of {block_size} tokens of {config.name} in {dtype})"
        )
    return kv_cache_bytes // block_bytes


def count_payload(
    layout: KVLayout,
    block_ids: Sequence[int],
    first_slot: int,
    layers: range,
    block_tokens: int,
    payload: memoryview,
    dtype: str,
) -> int:
    """Source blocks in the payload of an `import_blocks`. Raises TransferFailed: no such size, or no room for it."""
    if dtype not in DTYPES:
        raise TransferFailed(f"KV of dtype {dtype!r} cannot be read; known: {', '.join(DTYPES)}")
    block_bytes = len(layers) * 2 * layout.num_kv_heads * layout.head_dim * DTYPES[dtype].itemsize * block_tokens
    count, rest = divmod(payload.nbytes, block_bytes)
    if rest or count == 0:
        raise TransferFailed(
            f"KV payload of {payload.nbytes} bytes is not whole blocks of {block_bytes} bytes "
            f"({len(layers)} layers, {block_tokens} tokens, {dtype})"
        )
    room = len(block_ids) * layout.block_size - first_slot
    if count * block_tokens > room:
        raise TransferFailed(f"KV payload of {count * block_tokens} tokens, but room for {room}")
    return count


class KVCache:
    """Bytes in and out by block id. Which block belongs to whom is the block pool's business."""

    def __init__(self, layout: KVLayout, device: torch.device, ops: Ops) -> None:
        self.layout = layout
        self._ops = ops
        self._staging = KVStaging(device) if device.type == "cuda" else None
        shape = (layout.num_layers, layout.num_blocks, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        dtype = DTYPES[layout.dtype]
        try:
            self.tensor = torch.empty(shape, dtype=dtype, device=device)
            advise_huge_pages(self.tensor)
        except RuntimeError as error:
            wanted = math.prod(shape) * dtype.itemsize
            raise ConfigError(f"kv_cache_bytes: {wanted} bytes cannot be had on {device}") from error

    def export_blocks(self, block_ids: Sequence[int], layers: range, block_tokens: int) -> memoryview:
        """As `Runner.export_blocks` in engine/batch.py."""
        assert 0 < block_tokens <= self.layout.block_size, f"a block does not hold {block_tokens} tokens"

        def gather() -> torch.Tensor:
            return self._ops.gather_blocks(self.tensor, self._ids(block_ids), layers, block_tokens)

        # numpy has no bfloat16, and the wire wants bytes anyway.
        host = gather().flatten().view(torch.uint8) if self._staging is None else self._staging.to_host(gather)
        raw: np.ndarray[tuple[int], np.dtype[np.uint8]] = host.numpy()
        return raw.data

    def import_blocks(
        self,
        block_ids: Sequence[int],
        first_slot: int,
        layers: range,
        block_tokens: int,
        payload: memoryview,
        dtype: str,
    ) -> None:
        """As `Runner.import_blocks` in engine/batch.py. Nothing is written when it raises."""
        layout = self.layout
        block_count = count_payload(layout, block_ids, first_slot, layers, block_tokens, payload, dtype)
        # Copied first: the payload may be read-only, which torch cannot express, and need not be aligned.
        host = torch.empty(payload.nbytes, dtype=torch.uint8, pin_memory=self._staging is not None)
        host.numpy()[:] = np.frombuffer(payload, dtype=np.uint8)
        shape = (len(layers), block_count, 2, block_tokens, layout.num_kv_heads, layout.head_dim)

        def scatter(raw: torch.Tensor) -> None:
            blocks = raw.view(DTYPES[dtype]).view(shape)
            self._ops.scatter_blocks(self.tensor, self._ids(block_ids), first_slot, layers, blocks)

        if self._staging is None:
            scatter(host)
        else:
            self._staging.to_device(host, scatter)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks, (source, target), in all layers."""
        if pairs:
            self._ops.copy_blocks(self.tensor, torch.tensor(pairs, dtype=torch.int64, device=self.tensor.device))

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        assert all(0 <= block_id < self.layout.num_blocks for block_id in block_ids), "a block id outside the pool"
        return torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)
