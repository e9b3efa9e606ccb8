"""The operations of `kernels/ops.py` as Triton kernels, one file each."""

from __future__ import annotations

from kernels.gpu.copy_blocks import copy_blocks
from kernels.gpu.gather_blocks import gather_blocks
from kernels.gpu.paged_attention import paged_attention
from kernels.gpu.rms_norm import rms_norm
from kernels.gpu.rope_store import rope_store
from kernels.gpu.scatter_blocks import scatter_blocks
from kernels.gpu.silu_mul import silu_mul
from kernels.torch_ops import take_rows

__all__ = [
    "copy_blocks",
    "gather_blocks",
    "paged_attention",
    "rms_norm",
    "rope_store",
    "scatter_blocks",
    "silu_mul",
    "take_rows",
]
