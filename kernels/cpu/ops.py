"""The operations of `kernels/ops.py` in C++, for CPUs with AVX-512: float32 and bfloat16.

Other dtypes and layouts go the way of `kernels/torch_ops.py`, call by call. A call costs some microseconds of Python
beside its work, so nothing here makes a tensor that is not a result, and what a batch needs in every layer alike is
kept in `batch.plans`. The machine must have the library (`kernels.cpu.library.load`).
"""

from __future__ import annotations

import ctypes
import math

import torch

from kernels import torch_ops
from kernels.attention_batch import AttentionBatch
from kernels.attention_variant import AttentionVariant
from kernels.cpu.library import load
from kernels.cpu.recording import empty, not_recordable
from kernels.torch_ops import copy_blocks, gather_blocks, scatter_blocks

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

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}

# The widest head whose row of zeros and sums attention.h and its kernels hold.
_HEAD_DIM_MAX = 256

# More than any position: there is no window.
_NO_WINDOW = 1 << 62

_library = load()
assert _library is not None, "no C++ kernels on this machine"
_call = _library.call
_rms_norm = _library.function("tandem_rms_norm")
_rope_store = _library.function("tandem_rope_store")
_silu_mul = _library.function("tandem_silu_mul")
_paged_attention = _library.function("tandem_paged_attention")
_take_rows = _library.function("tandem_take_rows")


class _RmsNormArgs(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("outer", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("x_outer_stride", ctypes.c_int64),
        ("x_inner_stride", ctypes.c_int64),
        ("residual_outer_stride", ctypes.c_int64),
        ("residual_inner_stride", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("dtype", ctypes.c_int64),
    )


class _RopeStoreArgs(ctypes.Structure):
    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("q_token_stride", ctypes.c_int64),
        ("q_head_stride", ctypes.c_int64),
        ("k_token_stride", ctypes.c_int64),
        ("k_head_stride", ctypes.c_int64),
        ("v_token_stride", ctypes.c_int64),
        ("v_head_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class _SiluMulArgs(ctypes.Structure):
    _fields_ = (
        ("gate_up", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class _AttentionArgs(ctypes.Structure):
    _fields_ = (
        ("q", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("context_lengths", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("sink_logits", ctypes.c_void_p),
        ("q_token_stride", ctypes.c_int64),
        ("q_head_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("sink_tokens", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("dtype", ctypes.c_int64),
    )


class _TakeRowsArgs(ctypes.Structure):
    _fields_ = (
        ("table", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


def take_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    assert rows.dtype == torch.int64
    assert rows.is_contiguous()
    stride, last = table.stride()
    assert last == 1, "a row must be contiguous"
    count, width, size = rows.shape[0], table.shape[1], table.itemsize
    output = empty((count, width), table.dtype)
    _call(
        _take_rows,
        _TakeRowsArgs(table.data_ptr(), rows.data_ptr(), output.data_ptr(), count, width * size, stride * size),
    )
    return output


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    element, n = _ELEMENTS.get(weight.dtype), weight.shape[0]
    if element is None or x.dtype != weight.dtype:
        not_recordable("rms_norm of this dtype or layout")
        return torch_ops.rms_norm(x, weight, eps, residual)
    assert weight.is_contiguous()
    assert x.shape[-1] == n
    if not x.is_contiguous() or not (residual is None or residual.is_contiguous()):
        return _rms_norm_strided(x, weight, eps, residual, element)
    output, rows = empty(x.shape, x.dtype), x.numel() // n
    args = _RmsNormArgs(
        x.data_ptr(), None, weight.data_ptr(), output.data_ptr(), None, rows, 1, n, n, 0, n, 0, eps, element
    )
    total = x
    if residual is not None:
        assert residual.shape == x.shape
        assert residual.dtype == x.dtype
        total = empty(x.shape, x.dtype)
        args.residual, args.sum = residual.data_ptr(), total.data_ptr()
    _call(_rms_norm, args)
    return output, total


def _rms_norm_strided(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, element: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a view, say of the heads of one projection."""
    strides = x.stride()
    if strides[-1] != 1 or not 2 <= x.dim() <= 3:
        not_recordable("rms_norm of this dtype or layout")
        return torch_ops.rms_norm(x, weight, eps, residual)
    output = empty(x.shape, x.dtype)
    args = _RmsNormArgs(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        output=output.data_ptr(),
        outer=x.shape[0],
        inner=x.shape[1] if x.dim() == 3 else 1,
        n=x.shape[-1],
        x_outer_stride=strides[0],
        x_inner_stride=strides[1],
        eps=eps,
        dtype=element,
    )
    total = x
    if residual is not None:
        assert residual.shape == x.shape
        assert residual.dtype == x.dtype
        assert residual.stride(-1) == 1, "a row must be contiguous"
        total = empty(output.shape, x.dtype)
        args.residual, args.sum = residual.data_ptr(), total.data_ptr()
        args.residual_outer_stride, args.residual_inner_stride = residual.stride()[:2]
    _call(_rms_norm, args)
    return output, total


def rope_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    kv_layer: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    dtype = q.dtype
    element = _ELEMENTS.get(dtype)
    if element is None or kv_layer.dtype != dtype:
        not_recordable("rope_store of this dtype or layout")
        return torch_ops.rope_store(q, k, v, positions, table, kv_layer, slots)
    assert k.dtype == v.dtype == dtype
    assert table.dtype == torch.float32
    assert positions.dtype == slots.dtype == torch.int64
    tokens, heads, head_dim = q.shape
    _, _, block_size, kv_heads, _ = kv_layer.shape
    assert k.shape == v.shape == (tokens, kv_heads, head_dim)
    (q_token, q_head, q_last), (k_token, k_head, k_last), (v_token, v_head, v_last) = q.stride(), k.stride(), v.stride()
    assert q_last == k_last == v_last == 1, "a head must be contiguous"
    assert kv_layer.is_contiguous()
    assert table.is_contiguous()
    output = empty(q.shape, q.dtype)
    _call(
        _rope_store,
        _RopeStoreArgs(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), positions.data_ptr(), table.data_ptr(), kv_layer.data_ptr(),
            slots.data_ptr(), output.data_ptr(), tokens, heads, kv_heads, head_dim, block_size,
            q_token, q_head, k_token, k_head, v_token, v_head, element,
        ),
    )  # fmt: skip
    return output


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    dtype = gate_up.dtype
    element = _ELEMENTS.get(dtype)
    stride, last = gate_up.stride()
    if element is None or last != 1:
        not_recordable("silu_mul of this dtype or layout")
        return torch_ops.silu_mul(gate_up)
    tokens, both = gate_up.shape
    n = both // 2
    output = empty((tokens, n), dtype)
    _call(_silu_mul, _SiluMulArgs(gate_up.data_ptr(), output.data_ptr(), tokens, n, stride, element))
    return output


def paged_attention(
    q: torch.Tensor, kv_layer: torch.Tensor, batch: AttentionBatch, variant: AttentionVariant
) -> tuple[torch.Tensor, torch.Tensor]:
    key = (q.shape, q.dtype, kv_layer.dtype, variant.scale, variant.window, variant.soft_cap, variant.sink_tokens)
    template = batch.plans.get(key)
    if template is None:
        template = batch.plans[key] = _template(q, kv_layer, batch, variant) or False
    if not isinstance(template, _AttentionArgs):
        not_recordable("paged_attention of this dtype or layout")
        return torch_ops.paged_attention(q, kv_layer, batch, variant)
    q_token, q_head, q_last = q.stride()
    assert q_last == 1, "a head must be contiguous"
    assert kv_layer.is_contiguous()
    output = empty(q.shape, q.dtype)
    lse = empty((q.shape[0], q.shape[1]), torch.float32)
    args = _AttentionArgs.from_buffer_copy(template)
    args.q, args.output, args.lse, args.kv = q.data_ptr(), output.data_ptr(), lse.data_ptr(), kv_layer.data_ptr()
    args.q_token_stride, args.q_head_stride = q_token, q_head
    sink_logits = variant.sink_logits
    if sink_logits is not None:
        assert sink_logits.dtype == torch.float32
        assert sink_logits.is_contiguous()
        args.sink_logits = sink_logits.data_ptr()
    _call(_paged_attention, args)
    return output, lse


def _template(
    q: torch.Tensor, kv_layer: torch.Tensor, batch: AttentionBatch, variant: AttentionVariant
) -> _AttentionArgs | None:
    """All that is alike in every layer. None where torch computes."""
    tokens, heads, head_dim = q.shape
    _, _, block_size, kv_heads, _ = kv_layer.shape
    if q.dtype not in _ELEMENTS or kv_layer.dtype != q.dtype:
        return None
    if head_dim % 8 or head_dim > _HEAD_DIM_MAX or not variant.scale > 0 or math.isinf(variant.scale):
        return None
    assert tokens == batch.spans[-1].query_start + batch.spans[-1].query_count
    assert block_size == batch.block_size
    assert heads % kv_heads == 0
    for tensor in (batch.query_starts, batch.context_lengths, batch.block_tables):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    return _AttentionArgs(
        query_starts=batch.query_starts.data_ptr(),
        context_lengths=batch.context_lengths.data_ptr(),
        block_tables=batch.block_tables.data_ptr(),
        rows=len(batch.spans),
        table_stride=batch.block_tables.shape[1],
        block_size=block_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=_NO_WINDOW if variant.window is None else variant.window,
        sink_tokens=variant.sink_tokens,
        scale=variant.scale,
        soft_cap=variant.soft_cap or 0.0,
        dtype=_ELEMENTS[q.dtype],
    )
