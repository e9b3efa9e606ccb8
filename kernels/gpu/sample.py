"""Draws tokens from logits on the device: nothing here waits for it, or has a size that only it knows.

In the order of engine/sampler.py, with the roundings of its float32: edits (sample_edits.py), temperature, min_p,
top_k, top_p (sample_cuts.py), and then the argmax of what is kept plus Gumbel noise (counter_noise.py). Greedy is the
argmax of the edited logits. Of equal values the lowest id wins.

A row is split over several programs whose results a last kernel reduces. No result depends on the split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu import tuning
from kernels.gpu.counter_noise import gumbel_noise
from kernels.gpu.sample_cuts import depth_of, find_cuts, scale
from kernels.gpu.sample_edits import edit_logits
from kernels.gpu.sample_inputs import SampleInputs
from kernels.gpu.sample_split import NUM_WARPS, Split, candidates
from kernels.gpu.tuning import Config

NO_ID = tl.constexpr(2**31 - 1)
# Tokens that a program holds at once.
TILE = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _best(values: tl.tensor, token_ids: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(largest value, lowest id that has it)."""
    largest = tl.max(values, 0)
    return largest, tl.min(tl.where(values == largest, token_ids, NO_ID), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _find_largest(
    logits: tl.tensor,
    maxima: tl.tensor,
    ids: tl.tensor,
    vocab: tl.tensor,
    chunk: tl.tensor,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The largest logit of one program's part of a row, and its id."""
    row, split = tl.program_id(0), tl.program_id(1)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_ids = tl.zeros([TILE], tl.int32)
    for begin in range(split * chunk, tl.minimum((split + 1) * chunk, vocab), TILE):
        token_ids = begin + tl.arange(0, TILE)
        place = logits + row.to(tl.int64) * vocab + token_ids
        values = tl.load(place, mask=token_ids < vocab, other=float("-inf"))
        # A later id must be strictly better, which a NaN never is.
        is_better = values > best
        best_ids = tl.where(is_better, token_ids, best_ids)
        best = tl.where(is_better, values, best)
    largest, token_id = _best(best, best_ids)
    tl.store(maxima + row * SPLITS + split, largest)
    tl.store(ids + row * SPLITS + split, token_id)


@triton.jit  # type: ignore[untyped-decorator]
def _find_drawn(
    logits: tl.tensor,
    maxima: tl.tensor,
    temperatures: tl.tensor,
    cuts: tl.tensor,
    keys: tl.tensor,
    draw_rows: tl.tensor,
    drawn_maxima: tl.tensor,
    drawn_ids: tl.tensor,
    vocab: tl.tensor,
    chunk: tl.tensor,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The same of kept logits plus noise, for one draw. A greedy row's draws need none."""
    draw, split = tl.program_id(0), tl.program_id(1)
    row = tl.load(draw_rows + draw)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        key = tl.load(keys + draw)
        cut = tl.load(cuts + row)
        largest = tl.max(tl.load(maxima + row * SPLITS + tl.arange(0, SPLITS)), 0)
        best = tl.full([TILE], float("-inf"), tl.float32)
        best_ids = tl.zeros([TILE], tl.int32)
        for begin in range(split * chunk, tl.minimum((split + 1) * chunk, vocab), TILE):
            token_ids = begin + tl.arange(0, TILE)
            place = logits + row.to(tl.int64) * vocab + token_ids
            values = scale(tl.load(place, mask=token_ids < vocab, other=float("-inf")), largest, temperature)
            is_kept = (depth_of(values) <= cut) & (token_ids < vocab)
            values = tl.where(is_kept, values + gumbel_noise(key, token_ids), float("-inf"))
            is_better = values > best
            best_ids = tl.where(is_better, token_ids, best_ids)
            best = tl.where(is_better, values, best)
        best_value, token_id = _best(best, best_ids)
        tl.store(drawn_maxima + draw * SPLITS + split, best_value)
        tl.store(drawn_ids + draw * SPLITS + split, token_id)


@triton.jit  # type: ignore[untyped-decorator]
def _choose(
    maxima: tl.tensor,
    ids: tl.tensor,
    drawn_maxima: tl.tensor,
    drawn_ids: tl.tensor,
    temperatures: tl.tensor,
    draw_rows: tl.tensor,
    chosen: tl.tensor,
    SPLITS: tl.constexpr,
) -> None:
    """chosen[draw] = the best of all programs' parts."""
    draw = tl.program_id(0)
    row = tl.load(draw_rows + draw)
    places = tl.arange(0, SPLITS)
    if tl.load(temperatures + row) > 0:
        values = tl.load(drawn_maxima + draw * SPLITS + places)
        token_ids = tl.load(drawn_ids + draw * SPLITS + places)
    else:
        values = tl.load(maxima + row * SPLITS + places)
        token_ids = tl.load(ids + row * SPLITS + places)
    _, token_id = _best(values, token_ids)
    tl.store(chosen + draw, token_id.to(tl.int64))


def sample(logits: torch.Tensor, inputs: SampleInputs, split: Split | None = None) -> torch.Tensor:
    """The token id of every draw [draws] int64. `logits` [rows, vocab] float32, contiguous, stay unchanged.

    `split` overrides how rows are split over programs.
    """
    shape = inputs.shape
    rows, vocab = logits.shape
    assert inputs.packed.device == logits.device, f"inputs on {inputs.packed.device}, logits on {logits.device}"
    assert shape.rows == rows, f"inputs for {shape.rows} rows, logits of {rows}"
    if split is not None:
        return _sample(logits, inputs, split)
    rows_at_most = 1 << (rows - 1).bit_length()

    def run(config: Config) -> None:
        _sample(logits, inputs, Split(config.sizes["SPLITS"]))

    key = (rows_at_most, vocab, shape.any_noise, shape.any_top_k, shape.any_top_p)
    config = tuning.choose("sample", key, candidates(rows_at_most, vocab), run)
    return _sample(logits, inputs, Split(config.sizes["SPLITS"]))


def _sample(logits: torch.Tensor, inputs: SampleInputs, split: Split) -> torch.Tensor:
    shape = inputs.shape
    rows, vocab = logits.shape
    chunk = split.chunk(vocab)
    edited = edit_logits(logits, inputs)
    maxima = torch.empty(rows, split.count, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, split.count, dtype=torch.int32, device=logits.device)
    sizes = {"SPLITS": split.count, "num_warps": NUM_WARPS}
    _find_largest[(rows, split.count)](edited, maxima, ids, vocab, chunk, TILE=TILE, **sizes)
    drawn_maxima, drawn_ids = maxima, ids
    if shape.any_noise:
        cuts = find_cuts(edited, inputs, maxima, split)
        drawn_maxima = torch.empty(shape.draws, split.count, dtype=torch.float32, device=logits.device)
        drawn_ids = torch.empty(shape.draws, split.count, dtype=torch.int32, device=logits.device)
        _find_drawn[(shape.draws, split.count)](
            edited,
            maxima,
            inputs.temperatures,
            cuts,
            inputs.keys,
            inputs.draw_rows,
            drawn_maxima,
            drawn_ids,
            vocab,
            chunk,
            TILE=TILE,
            # The same noise on every device.
            enable_fp_fusion=False,
            **sizes,
        )
    chosen = torch.empty(shape.draws, dtype=torch.int64, device=logits.device)
    _choose[(shape.draws,)](
        maxima,
        ids,
        drawn_maxima,
        drawn_ids,
        inputs.temperatures,
        inputs.draw_rows,
        chosen,
        SPLITS=split.count,
        num_warps=1,
    )
    return chosen
