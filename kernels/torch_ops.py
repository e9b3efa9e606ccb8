"""The operations of `kernels/ops.py` in plain torch: they run on every device, and where nothing faster does.

Paged attention is in `kernels/torch_attention.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from kernels.torch_attention import paged_attention

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


def take_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, rows)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = x + residual
    return functional.rms_norm(x, (x.shape[-1],), weight, eps), x


def rope_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    kv_layer: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    cos, sin = table.index_select(0, positions)[:, None, :].chunk(2, dim=-1)
    k = _rotate(k, cos, sin)
    is_real = slots >= 0
    if not is_real.all():
        slots, k, v = slots[is_real], k[is_real], v[is_real]
    block_size = kv_layer.shape[2]
    rows = slots + slots.div(block_size, rounding_mode="floor") * block_size
    by_slot = kv_layer.view(-1, *kv_layer.shape[3:])
    k, v, by_slot = _movable(k.to(kv_layer.dtype)), _movable(v.to(kv_layer.dtype)), _movable(by_slot)
    by_slot.index_copy_(0, rows, k)
    by_slot.index_copy_(0, rows + block_size, v)
    return _rotate(q, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
    half = first.shape[-1]
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned.to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def copy_blocks(kv: torch.Tensor, pairs: torch.Tensor) -> None:
    kv = _movable(kv)
    kv[:, pairs[:, 1]] = kv[:, pairs[:, 0]]


def gather_blocks(kv: torch.Tensor, block_ids: torch.Tensor, layers: range, block_tokens: int) -> torch.Tensor:
    rows = _block_rows(kv, block_ids, layers)
    blocks = _movable(kv).view(kv.shape[0] * kv.shape[1], -1).index_select(0, rows)
    shaped = blocks.view(kv.dtype).view(len(layers), len(block_ids), *kv.shape[2:])
    return shaped if block_tokens == kv.shape[3] else shaped[:, :, :, :block_tokens].contiguous()


def scatter_blocks(
    kv: torch.Tensor, block_ids: torch.Tensor, first_slot: int, layers: range, blocks: torch.Tensor
) -> None:
    _, source_count, _, block_tokens, *row_shape = blocks.shape
    block_size = kv.shape[3]
    blocks, kv = _movable(blocks.to(kv.dtype)), _movable(kv)
    if block_tokens == block_size and first_slot == 0:
        rows = _block_rows(kv, block_ids[:source_count], layers)
        kv.view(kv.shape[0] * kv.shape[1], -1).index_copy_(0, rows, blocks.reshape(len(rows), -1))
        return
    places = torch.arange(first_slot, first_slot + source_count * block_tokens, device=kv.device)
    key_rows = block_ids[places.div(block_size, rounding_mode="floor")] * (2 * block_size) + places % block_size
    per_layer = kv[layers.start : layers.stop].view(len(layers), -1, *row_shape)
    for half in (0, 1):
        tokens = blocks[:, :, half].reshape(len(layers), -1, *row_shape)
        per_layer.index_copy_(1, key_rows + half * block_size, tokens)


def _movable(x: torch.Tensor) -> torch.Tensor:
    """The same elements as torch can copy them by index: float8 it cannot, bytes it can."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _block_rows(kv: torch.Tensor, block_ids: torch.Tensor, layers: range) -> torch.Tensor:
    """Rows of kv seen as [layers * num_blocks, block], layer by layer: each row is one contiguous run of memory."""
    first_rows = torch.arange(layers.start, layers.stop, device=kv.device) * kv.shape[1]
    return (first_rows[:, None] + block_ids[None, :]).flatten()
