"""The small kernels compile for Hopper, and those that move bytes do so 16 at a time."""

from __future__ import annotations

import re

import pytest

from tests.kernels.gpu.compiled_for_hopper import compile_for_hopper


def test_copies_are_of_16_bytes() -> None:
    compiled = compile_for_hopper("from tests.kernels.gpu.small_launches import launch_copies; launch_copies()")
    assert [kernel["name"] for kernel in compiled] == [
        "_gather_blocks",
        "_gather_blocks",
        "_scatter_blocks",
        "_copy_blocks",
    ]
    for kernel in compiled:
        # A thread takes as many neighbours at once as Triton can prove aligned: two words of 8 bytes.
        (layout,) = re.findall(r"tt\.store .*tensor<[\dx]*!tt\.ptr<i64>, (#\w+)>", kernel["ttgir"])
        (per_thread,) = re.findall(rf"{layout} = .*sizePerThread = \[([\d, ]+)\]", kernel["ttgir"])
        assert per_thread in ("2", "1, 2"), kernel["name"]


@pytest.mark.nightly
def test_the_rest_compiles_too() -> None:
    compiled = compile_for_hopper("from tests.kernels.gpu.small_launches import launch_the_rest; launch_the_rest()")
    assert {kernel["name"] for kernel in compiled} == {"_rms_norm", "_silu_mul", "_rope_store", "_scatter_blocks"}
    assert len(compiled) == 33
