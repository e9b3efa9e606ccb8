"""Which implementation of the operations and of matrix products a device gets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from kernels import torch_ops
from kernels.capture import Capture
from kernels.linear import DenseLinear, Linear
from kernels.ops import Ops

WeightFormat = Literal["dense", "int8", "int4"]

# Makes a matrix product of weight [out_features, in_features] and bias [out_features].
Pack = Callable[[torch.Tensor, torch.Tensor | None], Linear]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a model computes with on one device. `name`: where the operations come from.

    `bind(threads, cpus)` is called once by the thread that is going to compute: how many threads share the work (0:
    the default), and which CPUs they are bound to, one each (none: wherever the operating system puts them).
    `capture` makes what records forward passes, where they can be. `pack_head` is for the matrix that gives logits,
    where that is not packed like the others.
    """

    name: Literal["torch", "cpu", "triton"]
    ops: Ops
    pack: Pack
    bind: Callable[[int, Sequence[int]], None]
    capture: Callable[[], Capture] | None = None
    pack_head: Pack | None = None


def choose_kernels(
    device: torch.device, dtype: torch.dtype, weight_format: WeightFormat, wanted: Literal["auto", "torch"]
) -> Kernels:
    """The fastest that run here: Triton on CUDA, C++ on CPUs with AVX-512, plain torch everywhere else.

    Raises ValueError where the weight format is not to be had.
    """
    chosen = None
    if wanted == "auto":
        chosen = _triton() if device.type == "cuda" else _cpu(dtype, weight_format)
    chosen = chosen or Kernels("torch", torch_ops, DenseLinear, _bind_torch)
    if weight_format != "dense" and chosen.name != "cpu":
        raise ValueError(f"expected 'dense': quantised weights need the C++ kernels, and {device} uses {chosen.name}")
    return chosen


def _triton() -> Kernels | None:
    try:
        from kernels.gpu import ops
        from kernels.gpu.cuda_capture import CudaCapture
    except ImportError as error:
        logger.warning("no Triton kernels, plain torch computes instead: %s", error)
        return None
    return Kernels("triton", ops, DenseLinear, _bind_torch, CudaCapture)


def _cpu(dtype: torch.dtype, weight_format: WeightFormat) -> Kernels | None:
    from kernels.cpu.library import load

    library = load() if dtype in (torch.float32, torch.bfloat16) else None
    if library is None:
        return None
    from kernels.cpu import ops
    from kernels.cpu.linear import pack
    from kernels.cpu.recording import CallRecorder

    dense: Literal["float32", "bfloat16"] = "float32" if dtype == torch.float32 else "bfloat16"
    chosen = dense if weight_format == "dense" else weight_format
    # Rounding the head moves every logit: a file of four bits a weight has eight there, and so have we.
    head: Literal["float32", "bfloat16", "int8"] = "int8" if chosen == "int4" else chosen
    return Kernels(
        "cpu",
        ops,
        partial(pack, weight_format=chosen),
        _bind_cpu,
        partial(CallRecorder, library),
        partial(pack, weight_format=head),
    )


def _bind_torch(threads: int, cpus: Sequence[int]) -> None:
    if threads:
        torch.set_num_threads(threads)


def _bind_cpu(threads: int, cpus: Sequence[int]) -> None:
    from kernels.cpu.library import load

    library = load()
    assert library is not None, "chosen because it could be loaded"
    _bind_torch(threads or len(cpus), cpus)
    if threads or cpus:
        library.set_threads(threads or len(cpus))
    if cpus:
        # torch's threads inherit the mask of the one that starts them: start them before it is narrowed to one CPU.
        torch.ones(1 << 20).sum()
        library.pin(cpus)
