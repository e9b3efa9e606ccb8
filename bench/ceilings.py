"""What a device can do at best: how fast it copies memory, and how fast it multiplies matrices.

Runs with torch alone. Every share of a limit in docs/performance.md is of these, measured in the same run.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Far beyond any cache.
COPY_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
# More than any GPU's L2 cache (an H200 has 60 MB). Takes a quarter of a millisecond: the host meanwhile queues what is
# measured, so that launching does not count.
FLUSH_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`copy_bytes_per_s` counts each byte twice, read and written; `read_bytes_per_s` only reads."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flops: float


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int = 20, warm_up: int = 2) -> float:
    """Median seconds of one call. On CUDA with a cold L2 cache, between two events: a call that waits for the device
    counts with its waiting."""
    for _ in range(warm_up):
        work()
    return statistics.median(_cuda_seconds(work, rounds) if device.type == "cuda" else _seconds(work, rounds))


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, copy_bytes: int | None = None, matmul_size: int | None = None
) -> Ceilings:
    """A few seconds; holds twice `copy_bytes` meanwhile."""
    copy, read = _memory_rates(device, copy_bytes or COPY_BYTES[device.type])
    matmul = _matmul_flops(device, dtype, matmul_size or MATMUL_SIZE[device.type])
    if device.type == "cuda":
        # Other processes of a benchmark share the device.
        torch.cuda.empty_cache()
    return Ceilings(copy, read, matmul)


def describe(device: torch.device) -> str:
    """The device in words, for a table's heading."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return (
        f"{torch.get_num_threads()} CPU threads ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}"
    )


def _memory_rates(device: torch.device, size: int) -> tuple[float, float]:
    """Bytes a second of copying and of reading."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, words = torch.empty_like(source), source.view(torch.int64)
    copy_s = seconds_of(lambda: target.copy_(source), device, rounds=10)
    return 2 * size / copy_s, size / seconds_of(lambda: words.sum(), device, rounds=10)


def _matmul_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, device, rounds=10)


def _seconds(work: Callable[[], object], rounds: int) -> list[float]:
    samples = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        samples.append(time.perf_counter() - began)
    return samples


def _cuda_seconds(work: Callable[[], object], rounds: int) -> list[float]:
    flush = _flush_buffer()
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # Read, not written: lines that are dirty would have to leave the cache at the expense of what is measured.
        flush.sum()
        start.record()
        work()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) / 1e3 for start, end in spans]


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.ones(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
