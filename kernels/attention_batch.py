"""What attention must know about one batch, as explicit values: who asks, over which context, in which blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch


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


def build_attention_batch(
    rows: Sequence[tuple[int, int, Sequence[int]]], block_size: int, device: torch.device
) -> AttentionBatch:
    """From (first position, new tokens, block ids covering at least all of them) for each row.

    A padding row is (-1, 1, ()).
    """
    assert rows, "a batch has at least one row"
    starts = np.array([start for start, _, _ in rows], dtype=np.int64)
    counts = np.array([count for _, count, _ in rows], dtype=np.int64)
    assert (counts > 0).all(), "every row brings at least one token"
    contexts = starts + counts
    used = -(-contexts // block_size)
    tables = np.zeros((len(rows), max(1, int(used.max()))), dtype=np.int64)
    for row, (_, _, block_ids) in enumerate(rows):
        assert len(block_ids) >= used[row], f"row {row}: {len(block_ids)} blocks cannot hold {contexts[row]} tokens"
        tables[row, : used[row]] = block_ids[: used[row]]
    query_starts = np.concatenate(([0], np.cumsum(counts)))
    row_of_token = np.repeat(np.arange(len(rows)), counts)
    positions = np.arange(query_starts[-1]) - query_starts[row_of_token] + starts[row_of_token]
    is_real = positions >= 0
    positions = np.maximum(positions, 0)
    slots = tables[row_of_token, positions // block_size] * block_size + positions % block_size
    slots = np.where(is_real, slots, -1)
    spans = zip(query_starts[:-1].tolist(), counts.tolist(), contexts.tolist(), strict=True)
    return AttentionBatch(
        query_starts=torch.from_numpy(query_starts).to(device),
        context_lengths=torch.from_numpy(contexts).to(device),
        block_tables=torch.from_numpy(tables).to(device),
        positions=torch.from_numpy(positions).to(device),
        slots=torch.from_numpy(slots).to(device),
        block_size=block_size,
        spans=tuple(Span(*span) for span in spans),
    )
