"""Triton's interpreter with the casts and matrix products of a GPU. Sums and the rest are its own: NumPy's.

As of 3.9 the interpreter cuts float32 off to bfloat16 without rounding, loses the carry on the way to float8 (1.999
becomes 1.0), reads float8's NaN as 480, and multiplies bfloat16 matrices as if their bits were integers. Each of these
would be its error, not a kernel's. (It adds bfloat16 so, too: kernels do their sums in float32 and would not notice.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DTYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@contextmanager
def exact_interpreter() -> Iterator[None]:
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", _convert)
        patch.setattr(builder, "create_dot", _dot_of_exact_operands(builder.create_dot, interpreter.TensorHandle))
        yield


def _convert(array: np.ndarray, source: object, target: object, rounding_mode: object) -> np.ndarray:
    """To the nearest, ties to even. Takes and returns bits, in NumPy's type of the same width; source and target are
    Triton's dtypes."""
    bits = np.array(array, order="C").view(UNSIGNED[array.dtype.itemsize])
    values, wanted = torch.from_numpy(bits).view(DTYPES[str(source)]), DTYPES[str(target)]
    if wanted.itemsize == 1:
        # As the GPU's instruction saturates; torch made it NaN for a while.
        limit = torch.finfo(wanted).max
        values = values.float().clamp(-limit, limit)
    result = values.to(wanted).view(getattr(torch, f"uint{8 * wanted.itemsize}"))
    return result.numpy().reshape(array.shape)


def _dot_of_exact_operands(dot: Any, handle: Any) -> Any:
    """bfloat16 goes in as the float32 of the same value: as on a GPU, products are exact and sums are float32."""

    def widened(operand: Any) -> Any:
        if str(operand.dtype.scalar) != "bf16":
            return operand
        import triton.language as tl

        return handle(_convert(operand.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)

    def create_dot(self: object, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    return create_dot
