"""Every test of the Triton kernels takes `device` and so runs twice: [interpreter] on the CPU, and [cuda] on a GPU.

The second is marked `gpu`. A process does one of the two (tests/kernels/gpu/triton_mode.py says which), so that
`make test` interprets all of them and `pytest -m gpu tests/kernels/gpu` compiles all of them. Tensors of a test come
from the CPU with a fixed seed and go to `device`; results are compared on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.kernels.gpu.exact_interpreter import exact_interpreter
from tests.kernels.gpu.triton_mode import is_interpreted, pytest_configure

__all__ = ["device", "pytest_configure"]


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if is_interpreted():
            pytest.skip("Triton interprets in this process: select with -m gpu")
        yield torch.device("cuda")
        return
    if not is_interpreted():
        if os.environ["TRITON_INTERPRET"] == "0":
            pytest.skip("Triton compiles in this process: select without gpu")
        pytest.fail("triton was imported before tests/kernels/gpu/triton_mode.py could choose its interpreter")
    with exact_interpreter():
        yield torch.device("cpu")
