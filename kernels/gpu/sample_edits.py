"""Logit bias and the penalties of repetition, presence and frequency: changes of few tokens in a copy of the logits.

How often a token occurred is counted in a scratch row per row with penalties, by atomic additions; then whoever takes
a token's count out of the scratch first applies the penalties to it. So work goes with the histories' lengths, only
clearing the scratch goes with the vocabulary, and nobody has to sort or to make lists unique.

In the order and the roundings of engine/sampler.py: bias entry by entry, then repetition (arXiv:1909.05858), then
presence + frequency * count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.sample_inputs import SampleInputs

# Tokens of a program: few, since batches with edits are small and should still fill the GPU.
TILE = 256
# A word of the scratch: bit 0 is set by the prompt, each output token adds a whole PER_OUTPUT.
PER_OUTPUT = tl.constexpr(2)


@triton.jit  # type: ignore[untyped-decorator]
def _add_biases(
    logits: tl.tensor,
    biased_rows: tl.tensor,
    biased_ids: tl.tensor,
    bias_ends: tl.tensor,
    biases: tl.tensor,
    vocab: tl.tensor,
    biased: tl.tensor,
    biases_each: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """A lane per token: several biases of one token are added in order, as each addition rounds."""
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.load(biased_rows + entry, mask=entry < biased, other=-1).to(tl.int64)
    is_real = row >= 0
    place = logits + row * vocab + tl.load(biased_ids + entry, mask=is_real, other=0)
    begin = tl.load(bias_ends + entry - 1, mask=is_real & (entry > 0), other=0)
    end = tl.load(bias_ends + entry, mask=is_real, other=0)
    value = tl.load(place, mask=is_real, other=0.0)
    for index in range(0, biases_each):
        is_there = begin + index < end
        bias = tl.load(biases + begin + index, mask=is_there, other=0.0)
        value = tl.where(is_there, value + bias, value)
    tl.store(place, value, mask=is_real)


@triton.jit  # type: ignore[untyped-decorator]
def _count(
    scratch: tl.tensor,
    starts: tl.tensor,
    outputs: tl.tensor,
    ends: tl.tensor,
    token_ids: tl.tensor,
    vocab: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Marks every token of a history in its row of the scratch."""
    history = tl.program_id(0)
    index = tl.load(starts + history) + tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_real = index < tl.load(ends + history)
    is_output = index >= tl.load(outputs + history)
    place = scratch + history.to(tl.int64) * vocab + tl.load(token_ids + index, mask=is_real, other=0)
    tl.atomic_add(place, tl.full([TILE], PER_OUTPUT, tl.int32), mask=is_real & is_output, sem="relaxed")
    tl.atomic_or(place, tl.full([TILE], 1, tl.int32), mask=is_real & (is_output == 0), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _penalise(
    logits: tl.tensor,
    scratch: tl.tensor,
    rows: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    repetition: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
    token_ids: tl.tensor,
    vocab: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Takes counts out of the scratch: a token that comes again finds none, and is left as it is."""
    history = tl.program_id(0)
    row = tl.load(rows + history).to(tl.int64)
    index = tl.load(starts + history) + tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_real = index < tl.load(ends + history)
    token_id = tl.load(token_ids + index, mask=is_real, other=0)
    counts = scratch + history.to(tl.int64) * vocab + token_id
    found = tl.atomic_xchg(counts, tl.zeros([TILE], tl.int32), mask=is_real, sem="relaxed")
    is_mine = is_real & (found != 0)
    penalty = tl.load(repetition + history)
    value = tl.load(logits + row * vocab + token_id, mask=is_mine, other=0.0)
    value = tl.where(value > 0, tl.div_rn(value, penalty + tl.zeros_like(value)), value * penalty)
    count = found // PER_OUTPUT
    less = tl.load(presence + history) + tl.load(frequency + history) * count.to(tl.float32)
    value = tl.where(count > 0, value - less, value)
    tl.store(logits + row * vocab + token_id, value, mask=is_mine)


def edit_logits(logits: torch.Tensor, inputs: SampleInputs) -> torch.Tensor:
    """The edited logits [rows, vocab] float32, contiguous: a copy where `inputs` edits any, else `logits` themselves.

    A banned token has a bias of -inf, which no penalty brings back.
    """
    shape = inputs.shape
    assert logits.dtype == torch.float32, f"logits are float32, not {logits.dtype}"
    assert logits.is_contiguous(), "a row of logits follows the other"
    assert logits.shape[0] == shape.rows, f"logits {tuple(logits.shape)} for {shape.rows} rows"
    if not (shape.biased or shape.histories):
        return logits
    vocab = logits.shape[1]
    edited = logits.clone()
    if shape.biased:
        _add_biases[(triton.cdiv(shape.biased, TILE),)](
            edited,
            inputs.biased_rows,
            inputs.biased_ids,
            inputs.bias_ends,
            inputs.biases,
            vocab,
            shape.biased,
            shape.biases_each,
            TILE=TILE,
        )
    if shape.history_each:
        scratch = torch.zeros(shape.histories, vocab, dtype=torch.int32, device=logits.device)
        grid = (shape.histories, triton.cdiv(shape.history_each, TILE))
        starts, ends = inputs.history_starts, inputs.history_ends
        _count[grid](scratch, starts, inputs.history_outputs, ends, inputs.history_ids, vocab, TILE=TILE)
        _penalise[grid](
            edited,
            scratch,
            inputs.history_rows,
            starts,
            ends,
            inputs.repetition,
            inputs.presence,
            inputs.frequency,
            inputs.history_ids,
            vocab,
            TILE=TILE,
            # presence + frequency * count in two roundings, as everywhere else.
            enable_fp_fusion=False,
        )
    return edited
