"""Paged attention of a ragged batch: rows of one new token go to the decode kernel, longer ones to the prefill kernel.

Both write their own tokens of one output, so nothing is merged. Which row goes where is decided once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.attention_batch import AttentionBatch
from kernels.attention_variant import AttentionVariant
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.prefill_attention import prefill_attention

PLAN = "rows by kernel"


@dataclass(frozen=True, slots=True, eq=False)
class RowsByKernel:
    """`prefill` names rows of the batch; the rest are the decode kernel's rows, [n] and [n, max_blocks].

    `decode_tokens` None: row i is token i. A batch of decode rows alone is used as it is, without a copy, so that a
    captured graph reads what is later written into its tensors.
    """

    prefill: tuple[int, ...]
    decode_tokens: torch.Tensor | None
    decode_context_lengths: torch.Tensor
    decode_block_tables: torch.Tensor


def paged_attention(
    q: torch.Tensor, kv_layer: torch.Tensor, batch: AttentionBatch, variant: AttentionVariant
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels/ops.py`."""
    rows = batch.plans.get(PLAN)
    if not isinstance(rows, RowsByKernel):
        rows = batch.plans[PLAN] = _rows_by_kernel(batch)
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if rows.prefill:
        # First, as the longer: what the decode kernel launches fills the processors that its end leaves idle.
        prefill_attention(q, kv_layer, batch, rows.prefill, variant, output, lse)
    if len(rows.decode_context_lengths):
        decode_attention(
            q,
            kv_layer,
            rows.decode_tokens,
            rows.decode_context_lengths,
            rows.decode_block_tables,
            variant,
            output,
            lse,
        )
    return output, lse


def _rows_by_kernel(batch: AttentionBatch) -> RowsByKernel:
    prefill = tuple(row for row, span in enumerate(batch.spans) if span.query_count > 1)
    if not prefill:
        return RowsByKernel((), None, batch.context_lengths, batch.block_tables)
    decode = [row for row, span in enumerate(batch.spans) if span.query_count == 1]
    indices = torch.tensor(decode, dtype=torch.int64).to(batch.query_starts.device)
    return RowsByKernel(
        prefill,
        batch.query_starts.index_select(0, indices),
        batch.context_lengths.index_select(0, indices),
        batch.block_tables.index_select(0, indices),
    )
