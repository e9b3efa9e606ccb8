"""Packed step inputs say what the rows say, and padding says nothing."""

from __future__ import annotations

import pytest
import torch

from engine.batch import Row, SampleSpec
from engine.sampling import SamplingParams
from engine.step_inputs import pack_step, shape_of
from kernels.attention_batch import build_attention_batch

DRAW = SampleSpec(SamplingParams(), 0, 0)
ROWS = (
    Row("a", (5, 6, 7), 2, (9, 4)),
    Row("b", (8,), 6, (1, 0, 3), DRAW),
    Row("c", (1, 2, 3, 4), 0, (7,), DRAW),
)


def test_exact_inputs_agree_with_the_plain_batch() -> None:
    inputs = pack_step(ROWS, 4, shape_of(ROWS, 4), 9).on(torch.device("cpu"))
    plain = build_attention_batch(
        [(row.start, len(row.token_ids), row.block_ids) for row in ROWS], 4, torch.device("cpu")
    )
    for name in ("query_starts", "context_lengths", "block_tables", "positions", "slots"):
        assert torch.equal(getattr(inputs.attention, name), getattr(plain, name)), name
    assert inputs.attention.spans == plain.spans
    assert inputs.token_ids.tolist() == [5, 6, 7, 8, 1, 2, 3, 4]
    assert inputs.sampled.tolist() == [3, 7]


def test_padding_rows_read_and_write_nothing_and_come_last() -> None:
    rows = ROWS[1:2]
    inputs = pack_step(rows, 4, shape_of(rows, 4).padded(3, 5), 9)
    attention = inputs.attention
    assert attention.block_tables.tolist() == [[1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert attention.context_lengths.tolist() == [7, 0, 0]
    assert attention.slots.tolist() == [0 * 4 + 2, -1, -1]
    assert attention.positions.tolist() == [6, 0, 0]
    assert inputs.token_ids.tolist() == [8, 0, 0]
    assert inputs.sampled.tolist() == [0, 1, 2]


def test_nothing_but_padding() -> None:
    shape = shape_of(ROWS[1:2], 4).padded(2, 4)
    inputs = pack_step((), 4, shape, 9)
    assert inputs.attention.context_lengths.tolist() == [0, 0]
    assert inputs.attention.slots.tolist() == [-1, -1]


@pytest.mark.parametrize("token_id", [9, 10_000, -2])
def test_a_token_that_is_none_is_refused(token_id: int) -> None:
    row = Row("a", (3, token_id), 0, (1,))
    with pytest.raises(IndexError, match="the vocabulary has 9"):
        pack_step((row,), 4, shape_of((row,), 4), 9)
