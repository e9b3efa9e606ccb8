"""Memory for packed weights: a model's matrices side by side, in huge pages where the system gives them.

A decode step reads every weight once. With pages of 4 KiB the processor walks page tables all the way: it then read
SmolLM2-135M's weights at 27 GB/s, from huge pages at 36 GB/s (2 cores of an AMD EPYC 9004, virtualised).
"""

from __future__ import annotations

import threading

import torch

from kernels.cpu.huge_pages import advise_huge_pages

# Address space, not memory: pages become real when they are written.
CHUNK_BYTES = 256 << 20
ALIGNMENT = 64

# Smaller ones gain nothing, and would keep their chunk alive for others' sake.
LEAST_BYTES = 256 << 10


class _Chunks:
    """Hands out one chunk from front to back, then another. It lives as long as what is in it, or is the newest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: torch.Tensor | None = None
        self._used = 0

    def take(self, size: int) -> torch.Tensor:
        with self._lock:
            if self._chunk is None or self._used + size > self._chunk.numel():
                self._chunk = torch.empty(max(size + ALIGNMENT, CHUNK_BYTES), dtype=torch.uint8)
                advise_huge_pages(self._chunk)
                self._used = -self._chunk.data_ptr() % ALIGNMENT
            memory = self._chunk[self._used : self._used + size]
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
            return memory


_chunks = _Chunks()


def keep(packed: torch.Tensor) -> torch.Tensor:
    """The same values in memory that is 64-byte aligned and, if it is worth it, in huge pages."""
    if packed.numel() * packed.itemsize < LEAST_BYTES:
        return packed.clone(memory_format=torch.contiguous_format)
    memory = _chunks.take(packed.numel() * packed.itemsize)
    kept = memory.view(packed.dtype).view(packed.shape)
    kept.copy_(packed)
    return kept
