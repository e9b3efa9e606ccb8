"""The operations a model is made of, in plain torch. Faster kernels take their places behind the same signatures.

`kernels/reference.py` has the same functions written for clarity; tests hold these to at most twice its error.
Paged attention is in `kernels/paged_attention.py` and re-exported here, so that callers see one seam.
A layer's cache `kv_layer` is contiguous [num_blocks, 2, block_size, kv_heads, head_dim], K at index 0 and V at 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from kernels.paged_attention import paged_attention

__all__ = [
    "copy_blocks",
    "gather_blocks",
    "paged_attention",
    "rms_norm",
    "rope",
    "scatter_blocks",
    "silu_mul",
    "store_kv",
]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual) * weight, x + residual), over the last dimension. Without a residual the sum is x itself."""
    if residual is not None:
        x = x + residual
    return functional.rms_norm(x, (x.shape[-1],), weight, eps), x


def rope(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim] by their positions, half-split form.

    `table` [max_context, head_dim] float32 holds cosines, then sines. Products are float32 whatever q's dtype:
    the table is not rounded to 16 bits.
    """
    cos, sin = table.index_select(0, positions)[:, None, :].chunk(2, dim=-1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
    half = first.shape[-1]
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned.to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for gate_up [..., 2 * n], gate first. Returns [..., n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def store_kv(k: torch.Tensor, v: torch.Tensor, kv_layer: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes k and v [tokens, kv_heads, head_dim] into the slots [tokens] of one layer's cache."""
    block_size = kv_layer.shape[2]
    by_slot = kv_layer.view(-1, *kv_layer.shape[3:])
    rows = slots + slots.div(block_size, rounding_mode="floor") * block_size
    by_slot.index_copy_(0, rows, k)
    by_slot.index_copy_(0, rows + block_size, v)


def copy_blocks(kv: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copies whole blocks in all layers of kv [layers, num_blocks, ...]. `pairs` [n, 2]: (source, target).

    All sources are read before any target is written.
    """
    kv[:, pairs[:, 1]] = kv[:, pairs[:, 0]]


def gather_blocks(kv: torch.Tensor, block_ids: torch.Tensor, layers: range, block_tokens: int) -> torch.Tensor:
    """The first `block_tokens` slots of each block, as a fresh contiguous
    [layers, blocks, 2, block_tokens, kv_heads, head_dim]."""
    rows = _block_rows(kv, block_ids, layers)
    blocks = kv.view(kv.shape[0] * kv.shape[1], -1).index_select(0, rows)
    shaped = blocks.view(len(layers), len(block_ids), *kv.shape[2:])
    return shaped if block_tokens == kv.shape[3] else shaped[:, :, :, :block_tokens].contiguous()


def scatter_blocks(
    kv: torch.Tensor, block_ids: torch.Tensor, first_slot: int, layers: range, blocks: torch.Tensor
) -> None:
    """The other end of `gather_blocks`: writes the tokens of `blocks` [layers, source blocks, 2, block_tokens,
    kv_heads, head_dim], in order, into the slots of `block_ids`, from `first_slot` of the first one on."""
    _, source_count, _, block_tokens, *row_shape = blocks.shape
    block_size = kv.shape[3]
    blocks = blocks.to(kv.dtype)
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


def _block_rows(kv: torch.Tensor, block_ids: torch.Tensor, layers: range) -> torch.Tensor:
    """Rows of kv seen as [layers * num_blocks, block], layer by layer: each row is one contiguous run of memory."""
    first_rows = torch.arange(layers.start, layers.stop, device=kv.device) * kv.shape[1]
    return (first_rows[:, None] + block_ids[None, :]).flatten()
