"""What one forward pass reads besides weights and cache: one packed tensor, so that a device gets it in a single copy.

    [ what attention must know | token_ids | sampled ]        all int64

A step may be padded to a larger shape with rows of one token that read and write nothing (kernels/attention_batch.py);
so one recorded CUDA graph serves every batch that fits its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.batch import PENDING_TOKEN, Row
from kernels import attention_batch
from kernels.attention_batch import AttentionBatch, BatchShape, RowSpec, Span


@dataclass(frozen=True, slots=True)
class StepShape:
    """`samples` is the number of tokens whose logits are wanted."""

    attention: BatchShape
    samples: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Elements of each section, in order."""
        return sum(self.attention.sizes), self.attention.tokens, self.samples

    def padded(self, rows: int, blocks: int) -> StepShape:
        """With so many rows in all, the new ones of one token which is sampled from, and tables that wide."""
        extra = rows - self.attention.rows
        shape = replace(self.attention, rows=rows, tokens=self.attention.tokens + extra, blocks=blocks)
        return StepShape(shape, self.samples + extra)


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """Views into one packed tensor."""

    shape: StepShape
    packed: torch.Tensor
    attention: AttentionBatch
    token_ids: torch.Tensor  # [tokens]
    sampled: torch.Tensor  # [samples], which tokens

    def on(self, device: torch.device) -> StepInputs:
        """The same on a device; from pinned memory the copy does not wait."""
        packed = self.packed.to(device, non_blocking=True)
        return view_step(packed, self.shape, self.attention.block_size, self.attention.spans)


def shape_of(rows: Sequence[Row], block_size: int) -> StepShape:
    """The least shape that holds these rows."""
    return StepShape(attention_batch.shape_of(_specs(rows), block_size), sum(row.sample is not None for row in rows))


def pack_step(
    rows: Sequence[Row], block_size: int, shape: StepShape, vocab_size: int, pinned: bool = False
) -> StepInputs:
    """Lays the rows out in host memory; what `shape` has beyond them becomes padding, and tokens that are not drawn yet
    are PENDING_TOKEN.

    Raises IndexError for a token that is none: a kernel would read whatever lies there.
    """
    packed = torch.empty(sum(shape.sizes), dtype=torch.int64, pin_memory=pinned)
    attention, token_ids, sampled = (section.numpy() for section in torch.split(packed, list(shape.sizes)))
    spans = attention_batch.pack(_specs(rows), block_size, shape.attention, attention)
    ids = [token_id for row in rows for token_id in row.token_ids]
    token_ids[: len(ids)] = ids
    token_ids[len(ids) :] = 0
    if token_ids.max() >= vocab_size or token_ids.min() < PENDING_TOKEN:
        raise IndexError(f"tokens {token_ids.min()} to {token_ids.max()}: the vocabulary has {vocab_size}")
    last = [span.query_start + span.query_count - 1 for span in spans]
    wanted = [token for token, row in zip(last, rows, strict=False) if row.sample is not None]
    sampled[:] = wanted + last[len(rows) :]
    return view_step(packed, shape, block_size, spans)


def view_step(packed: torch.Tensor, shape: StepShape, block_size: int, spans: tuple[Span, ...]) -> StepInputs:
    """The sections of a packed tensor, on whatever device it is."""
    attention, token_ids, sampled = torch.split(packed, list(shape.sizes))
    batch = attention_batch.view(attention, shape.attention, block_size, spans)
    return StepInputs(shape, packed, batch, token_ids, sampled)


def _specs(rows: Sequence[Row]) -> list[RowSpec]:
    return [(row.start, len(row.token_ids), row.block_ids) for row in rows]
