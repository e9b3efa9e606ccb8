"""What attention must know about one batch, as explicit values: who asks, over which context, in which blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

# First position, new tokens, block ids that cover at least all of them.
RowSpec = tuple[int, int, Sequence[int]]
PADDING_ROW: RowSpec = (-1, 1, ())


class Span(NamedTuple):
    """One row on the host's side: tokens [query_start, query_start + query_count) of the batch are the last
    `query_count` of `context` tokens."""

    query_start: int
    query_count: int
    context: int

    @property
    def start(self) -> int:
        """The position of the row's first new token."""
        return self.context - self.query_count


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """A ragged batch of `rows` rows and `tokens` new tokens, over a paged cache. All tensors int64.

    A padding row has one token, context 0, position 0 and slot -1: it reads and writes nothing. Entries of
    `block_tables` past a row's context are padding too: any valid block, whose content must never matter. `spans` says
    the same as `query_starts` and `context_lengths`, for code on the host that must not wait for a device.
    `plans` is scratch space for an implementation to keep what it derives once and uses in every layer.
    """

    query_starts: torch.Tensor  # [rows + 1]
    context_lengths: torch.Tensor  # [rows], the new tokens included
    block_tables: torch.Tensor  # [rows, blocks of the longest row]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens], block_id * block_size + place in the block; -1 for padding
    block_size: int
    spans: tuple[Span, ...]
    plans: dict[object, object] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Sizes of an AttentionBatch; `blocks` is the width of its block tables."""

    rows: int
    tokens: int
    blocks: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Elements of query_starts, context_lengths, block_tables, positions and slots."""
        return self.rows + 1, self.rows, self.rows * self.blocks, self.tokens, self.tokens


def shape_of(rows: Sequence[RowSpec], block_size: int) -> BatchShape:
    """The least shape that holds these rows."""
    assert rows, "a batch has at least one row"
    blocks = max(-(-(start + count) // block_size) for start, count, _ in rows)
    return BatchShape(len(rows), sum(count for _, count, _ in rows), max(1, blocks))


def pack(
    rows: Sequence[RowSpec], block_size: int, shape: BatchShape, out: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> tuple[Span, ...]:
    """Writes a batch's five tensors one after another into `out` [sum(shape.sizes)]; what `view` takes apart.

    Rows that `shape` has beyond the given ones become padding, and so does a row (-1, 1, ()).
    """
    rows = [*rows, *([PADDING_ROW] * (shape.rows - len(rows)))]
    query_starts, contexts, tables, positions, slots = np.split(out, np.cumsum(shape.sizes)[:-1])
    starts = np.array([start for start, _, _ in rows], dtype=np.int64)
    counts = np.array([count for _, count, _ in rows], dtype=np.int64)
    assert (counts > 0).all(), "every row brings at least one token"
    query_starts[0] = 0
    np.cumsum(counts, out=query_starts[1:])
    contexts[:] = starts + counts
    by_row = tables.reshape(shape.rows, shape.blocks)
    by_row[:] = 0
    for row, (used, (_, _, block_ids)) in enumerate(zip((-(-contexts // block_size)).tolist(), rows, strict=True)):
        assert len(block_ids) >= used, f"row {row}: {len(block_ids)} blocks cannot hold {contexts[row]} tokens"
        by_row[row, :used] = block_ids[:used]
    row_of_token = np.repeat(np.arange(shape.rows), counts)
    places = np.arange(shape.tokens) - query_starts[row_of_token] + starts[row_of_token]
    np.maximum(places, 0, out=positions)
    slots[:] = by_row[row_of_token, positions // block_size] * block_size + positions % block_size
    slots[places < 0] = -1
    return tuple(map(Span, query_starts[:-1].tolist(), counts.tolist(), contexts.tolist()))


def view(packed: torch.Tensor, shape: BatchShape, block_size: int, spans: tuple[Span, ...]) -> AttentionBatch:
    """The tensors of a packed batch, on whatever device it is."""
    query_starts, contexts, tables, positions, slots = torch.split(packed, list(shape.sizes))
    tables = tables.view(shape.rows, shape.blocks)
    return AttentionBatch(query_starts, contexts, tables, positions, slots, block_size, spans)


def build_attention_batch(rows: Sequence[RowSpec], block_size: int, device: torch.device) -> AttentionBatch:
    """A batch of exactly these rows."""
    shape = shape_of(rows, block_size)
    packed = torch.empty(sum(shape.sizes), dtype=torch.int64)
    spans = pack(rows, block_size, shape, packed.numpy())
    return view(packed.to(device), shape, block_size, spans)
