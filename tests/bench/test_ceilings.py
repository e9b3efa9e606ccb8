"""What a device can do at best, measured small."""

from __future__ import annotations

import time

import pytest
import torch

from bench.ceilings import describe, measure_ceilings, seconds_of

CPU = torch.device("cpu")


def test_the_median_of_so_many_calls() -> None:
    naps = iter([0.0, 0.0, 0.002, 0.05, 0.004])
    seconds = seconds_of(lambda: time.sleep(next(naps)), CPU, rounds=3, warm_up=2)
    assert 0.004 <= seconds < 0.04
    assert next(naps, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ceilings_are_sane(dtype: torch.dtype) -> None:
    """Between a slow machine of twenty years ago and anything there is."""
    ceilings = measure_ceilings(CPU, dtype, copy_bytes=8 << 20, matmul_size=128)
    assert 1e8 < ceilings.copy_bytes_per_s < 1e13
    assert 1e8 < ceilings.read_bytes_per_s < 1e13
    assert 1e8 < ceilings.matmul_flops < 1e16


def test_a_device_in_words() -> None:
    assert f"{torch.get_num_threads()} CPU threads" in describe(CPU)
