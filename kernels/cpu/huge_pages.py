"""Memory in large pages: tables that hold all of a model's KV would otherwise miss the TLB at every block."""

from __future__ import annotations

import ctypes
import sys

import torch

PAGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Asks the kernel to back a tensor that has not been written yet by pages of 2 MiB. Only advice: where the system
    does not know it, or has none, nothing changes.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    length = tensor.data_ptr() + tensor.numel() * tensor.itemsize - start
    if length >= PAGE_BYTES:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(MADV_HUGEPAGE))
