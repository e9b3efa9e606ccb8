"""Launches of the small kernels: Llama-3.1-8B's shapes in every dtype, every head_dim, and shapes of ones, for which
Triton compiles apart. Values do not matter."""

from __future__ import annotations

import torch

from kernels.gpu.copy_blocks import copy_blocks
from kernels.gpu.gather_blocks import gather_blocks
from kernels.gpu.rms_norm import rms_norm
from kernels.gpu.rope_store import rope_store
from kernels.gpu.scatter_blocks import scatter_blocks
from kernels.gpu.silu_mul import silu_mul

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FP8 = torch.float8_e4m3fn
IDS = torch.zeros(3, dtype=torch.int64)


def launch_copies() -> None:
    """Four kernels that only move bytes: a gather of whole blocks and one of parts, a scatter, a copy."""
    kv = torch.zeros(2, 4, 2, 16, 8, 128, dtype=torch.bfloat16)
    gather_blocks(kv, IDS, range(2), 16)
    gather_blocks(kv, IDS, range(2), 7)
    scatter(torch.bfloat16, torch.bfloat16, 8, 128)
    copy_blocks(kv, torch.zeros(3, 2, dtype=torch.int64))


def launch_the_rest() -> None:
    for dtype in DTYPES:
        norm(dtype, 64, 4096)
        silu_mul(torch.zeros(64, 28672, dtype=dtype))
        for head_dim in (64, 80, 96, 128, 256):
            rope(dtype, dtype, head_dim)
        rope(dtype, FP8, 128)
        scatter(dtype, FP8, 8, 128)
        scatter(FP8, dtype, 8, 128)
    norm(torch.bfloat16, 1, 1)
    silu_mul(torch.zeros(1, 2))
    scatter(torch.bfloat16, torch.bfloat16, 1, 1)


def rope(dtype: torch.dtype, cache: torch.dtype, head_dim: int) -> None:
    q, k, v = torch.zeros(3, 48, head_dim, dtype=dtype).split((32, 8, 8), 1)
    kv_layer = torch.zeros(4, 2, 16, 8, head_dim, dtype=cache)
    rope_store(q, k, v, IDS, torch.zeros(9, head_dim), kv_layer, IDS)


def norm(dtype: torch.dtype, *shape: int) -> None:
    x = torch.zeros(shape, dtype=dtype)
    rms_norm(x, x.view(-1)[: shape[-1]], 1e-5, x)


def scatter(sent: torch.dtype, cache: torch.dtype, *row: int) -> None:
    kv = torch.zeros(2, 4, 2, 16, *row, dtype=cache)
    scatter_blocks(kv, IDS, 0, range(2), torch.zeros(2, 3, 2, 16, *row, dtype=sent))
