"""Matrix products with packed weights on CPUs with AVX-512: `linear.h` says how they are laid out and computed."""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
import torch.nn.functional as functional

from kernels.cpu.library import Library, load
from kernels.cpu.memory import keep
from kernels.cpu.recording import empty
from kernels.linear import Linear
from kernels.quantise import QuantisedWeight, quantise

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]

_COLUMNS = 32  # kColumns of linear.h
_FORMATS: dict[WeightFormat, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}


class LinearArgs(ctypes.Structure):
    """`LinearArgs` of linear.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("element", ctypes.c_int32),
        ("wide_scales", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class PackedLinear:
    """A `Linear` whose weights lie in panels."""

    def __init__(
        self,
        library: Library,
        panels: torch.Tensor,
        out_features: int,
        in_features: int,
        bias: torch.Tensor | None,
        weight_format: WeightFormat,
        wide_scales: bool = False,
    ) -> None:
        assert panels.is_contiguous()
        assert panels.data_ptr() % 64 == 0, "panels are loaded whole cache lines at a time"
        self.in_features, self.out_features = in_features, out_features
        self.weight_bytes = panels.numel() * panels.itemsize
        # Both are only ever read through the addresses below.
        self._panels = panels
        self._bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        self._library, self._function = library, library.function("tandem_linear")
        self._dtypes = tuple(_ELEMENTS) if weight_format in ("int8", "int4") else (_DTYPES[weight_format],)
        self._template = LinearArgs(
            weights=panels.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            in_features=in_features,
            out_features=out_features,
            y_stride=out_features,
            format=_FORMATS[weight_format],
            wide_scales=wide_scales,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, in_features]: float32 or bfloat16; the weights' own dtype where they have one."""
        assert x.dtype in self._dtypes, f"these weights multiply {self._dtypes}, not {x.dtype}"
        tokens, in_features = x.shape
        assert in_features == self.in_features
        assert x.stride(1) == 1 or in_features == 1, "a row must be contiguous"
        y = empty((tokens, self.out_features), x.dtype)
        args = LinearArgs.from_buffer_copy(self._template)
        args.x, args.y, args.rows, args.x_stride = x.data_ptr(), y.data_ptr(), tokens, x.stride(0)
        args.element = _ELEMENTS[x.dtype]
        self._library.call(self._function, args)
        return y


def pack(weight: torch.Tensor, bias: torch.Tensor | None, weight_format: WeightFormat) -> Linear:
    """Lays weight [out_features, in_features], of any float dtype, and bias [out_features] out for `linear.cpp`.

    The integer formats round, as `kernels/quantise.py` says. The machine must have the library
    (`kernels.cpu.library.load`).
    """
    library = load()
    assert library is not None, "no C++ kernels on this machine"
    out_features, in_features = weight.shape
    weight = functional.pad(weight.detach(), (0, 0, 0, -out_features % _COLUMNS))
    wide_scales = False
    if weight_format == "int8" or weight_format == "int4":
        quantised = quantise(weight, weight_format)
        panels, wide_scales = _integer_panels(quantised), not quantised.is_half
    else:
        panels = _dense_panels(weight.to(_DTYPES[weight_format]))
    return PackedLinear(library, keep(panels), out_features, in_features, bias, weight_format, wide_scales)


def _dense_panels(weight: torch.Tensor) -> torch.Tensor:
    """[panels, steps, columns, values per lane]."""
    per_lane = 4 // weight.itemsize
    padded = functional.pad(weight, (0, -weight.shape[1] % per_lane))
    return padded.view(-1, _COLUMNS, padded.shape[1] // per_lane, per_lane).transpose(1, 2)


def _integer_panels(weight: QuantisedWeight) -> torch.Tensor:
    """[panels, groups, bytes]: of a group first the quads [8, 2, 16, 4], then the scales [32], then int4's minima."""
    out_features, groups, _ = weight.values.shape
    panels = out_features // _COLUMNS
    values = weight.values.view(panels, 2, 16, groups, 8, 4).permute(0, 3, 4, 1, 2, 5)
    dtype = torch.float16 if weight.is_half else torch.float32

    def by_panel(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.view(panels, _COLUMNS, groups).transpose(1, 2).to(dtype).contiguous().view(torch.uint8)

    parts = [by_panel(weight.scales)]
    if weight.weight_format == "int4":
        values = values[:, :, 0::2] | values[:, :, 1::2] << 4
        parts.append(by_panel(weight.minima))
    return torch.cat([values.flatten(2), *parts], dim=2)
