"""The operations of `kernels/ops.py`, written to be read: same signatures, any float dtype, one token at a time.

Run in float64 they are the truth that tests measure against; run in a kernel's own dtype, the error it may double.
"""

from __future__ import annotations

import math

import torch

from kernels.attention_batch import AttentionBatch
from kernels.attention_variant import AttentionVariant


def take_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([table[row] for row in rows.tolist()])


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Source: https://arxiv.org/abs/1910.07467."""
    if residual is not None:
        x = x + residual
    mean_square = (x * x).mean(-1, keepdim=True)
    return x / torch.sqrt(mean_square + eps) * weight, x


def rope_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    kv_layer: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Pair i of a head is its elements i and i + head_dim / 2, turned by the angle of position and i."""
    block_size = kv_layer.shape[2]
    rotated_q, rotated_k = _rotate(q, positions, table), _rotate(k, positions, table)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            kv_layer[slot // block_size, 0, slot % block_size] = rotated_k[token].to(kv_layer.dtype)
            kv_layer[slot // block_size, 1, slot % block_size] = v[token].to(kv_layer.dtype)
    return rotated_q


def _rotate(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    half = table.shape[1] // 2
    out = torch.empty(x.shape, dtype=x.dtype)
    for token, position in enumerate(positions.tolist()):
        cos, sin = table[position, :half].to(x.dtype), table[position, half:].to(x.dtype)
        out[token, :, :half] = x[token, :, :half] * cos - x[token, :, half:] * sin
        out[token, :, half:] = x[token, :, half:] * cos + x[token, :, :half] * sin
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Source: https://arxiv.org/abs/2002.05202."""
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    return gate / (1 + torch.exp(-gate)) * up


def paged_attention(
    q: torch.Tensor, kv_layer: torch.Tensor, batch: AttentionBatch, variant: AttentionVariant
) -> tuple[torch.Tensor, torch.Tensor]:
    block_size, group = kv_layer.shape[2], q.shape[1] // kv_layer.shape[3]
    output = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for row, table in enumerate(batch.block_tables.tolist()):
        first_token, end_token = batch.query_starts[row : row + 2].tolist()
        for token in range(first_token, end_token):
            position = int(batch.context_lengths[row]) - (end_token - token)
            seen = [
                (table[j // block_size], j % block_size) for j in range(position + 1) if _sees(position, j, variant)
            ]
            if not seen:
                continue
            keys = torch.stack([kv_layer[block, 0, slot] for block, slot in seen]).to(q.dtype)
            values = torch.stack([kv_layer[block, 1, slot] for block, slot in seen]).to(q.dtype)
            for head in range(q.shape[1]):
                scores = keys[:, head // group] @ q[token, head] * variant.scale
                if variant.soft_cap is not None:
                    scores = variant.soft_cap * torch.tanh(scores / variant.soft_cap)
                if variant.sink_logits is not None:
                    scores = torch.cat((scores, variant.sink_logits[head : head + 1].to(q.dtype)))
                output[token, head] = torch.softmax(scores, 0)[: len(seen)] @ values[:, head // group]
                lse[token, head] = torch.logsumexp(scores.to(lse.dtype), 0)
    return output, lse


def _sees(position: int, key: int, variant: AttentionVariant) -> bool:
    return variant.window is None or key > position - variant.window or key < variant.sink_tokens


def copy_blocks(kv: torch.Tensor, pairs: torch.Tensor) -> None:
    before = kv.clone()
    for source, target in pairs.tolist():
        kv[:, target] = before[:, source]


def gather_blocks(kv: torch.Tensor, block_ids: torch.Tensor, layers: range, block_tokens: int) -> torch.Tensor:
    return torch.stack(
        [torch.stack([kv[layer, block, :, :block_tokens] for block in block_ids.tolist()]) for layer in layers]
    )


def scatter_blocks(
    kv: torch.Tensor, block_ids: torch.Tensor, first_slot: int, layers: range, blocks: torch.Tensor
) -> None:
    block_size, block_tokens = kv.shape[3], blocks.shape[3]
    for index in range(blocks.shape[1]):
        for slot in range(block_tokens):
            place = first_slot + index * block_tokens + slot
            target = int(block_ids[math.floor(place / block_size)])
            for layer in layers:
                kv[layer, target, :, place % block_size] = blocks[layer - layers.start, index, :, slot].to(kv.dtype)
