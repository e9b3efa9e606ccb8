"""Words are as wide as lengths and addresses allow, and views of the same memory."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu.words import as_words


@pytest.mark.parametrize(
    ("elements", "dtype", "run_bytes", "width"),
    [
        (64, torch.bfloat16, 32, 8),
        (64, torch.bfloat16, 12, 4),
        (64, torch.bfloat16, 10, 2),
        (64, torch.float8_e4m3fn, 15, 1),
        (63, torch.float32, 252, 4),
    ],
)
def test_width_by_length(elements: int, dtype: torch.dtype, run_bytes: int, width: int) -> None:
    x = torch.zeros(elements, dtype=dtype)
    (words,) = as_words(x, run_bytes=run_bytes)
    assert words.element_size() == width
    assert words.nbytes == x.nbytes
    assert words.data_ptr() == x.data_ptr()


def test_width_by_address_and_by_the_narrowest_of_all() -> None:
    x = torch.zeros(66, dtype=torch.bfloat16)
    assert [words.element_size() for words in as_words(x[2:], x[:64], run_bytes=64)] == [4, 4]
