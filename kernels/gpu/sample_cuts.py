"""Where min_p, top_k and top_p cut a row, found without a sort.

A row's scaled logits l = (logit - largest) / temperature are never above 0, so the bits of |l|, its *depth*, order them
as integers: 0 is the most likely token, INFINITY_DEPTH is -inf. Each filter keeps what is no deeper than some cut, ties
included, and all three have one form: the least depth at which a weight, summed over every token no deeper, reaches a
target.

    min_p    known beforehand: the depth of log(min_p)
    top_k    weight 1, target k
    top_p    weight exp(l), target top_p * the sum over what the filters before it left: just so many tokens are kept
             that those strictly likelier than the last weigh less than top_p (arXiv:1904.09751)

The search asks for the weights up to WAYS depths at once, and goes on between two of them:

    narrow     all programs, twice: first between powers of two, then between 16 depths in one of those
    compact    all programs: lists the row's tokens still in between, typically some hundred
    finish     one program per row: goes on in that list until one depth is left

Weights are integers, so no order of additions changes a sum, and a row's cut does not depend on how it is split over
programs. exp(l) is in units of 2^-44: 2^18 tokens sum up to no more than 2^62, and what is lost of less likely tokens
is below 2^-26 in all.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.gpu.counter_noise import LN2_HIGH, LN2_LOW
from kernels.gpu.sample_inputs import SampleInputs
from kernels.gpu.sample_split import NUM_WARPS, Split

INFINITY_DEPTH = 0x7F800000
# So many weights of 2^44 cannot overflow.
VOCAB_MAX = 1 << 18
# Deeper than every token: of a place beyond the vocabulary.
NO_DEPTH = tl.constexpr(0x7FFFFFFF)
# Depths asked for at once. The work of a program is a tile of WAYS x TILE; doubling it saves a quarter of the rounds.
WAYS = tl.constexpr(16)
# WAYS x TILE accumulators of 8 bytes are a quarter of the registers of 4 warps.
TILE = 256
# The first depths are those of l = -2^-6, -2^-5, …, -2^8, and the cut so far.
FIRST_EXPONENT = tl.constexpr(127 - 6)
# exp(l) in units of 2^-44 is below one half from here on.
LOWEST = tl.constexpr(-32.0)
WEIGHT_UNITS = tl.constexpr(2.0**44)
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit  # type: ignore[untyped-decorator]
def scale(logits: tl.tensor, largest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """l of logits, rounded as engine/sampler.py does. A row without any finite logit is all -inf."""
    base = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.div_rn(logits - base, temperature + tl.zeros_like(logits))


@triton.jit  # type: ignore[untyped-decorator]
def depth_of(scaled: tl.tensor) -> tl.tensor:
    """The bits of |l|, int32: -0 is as deep as 0."""
    return scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit  # type: ignore[untyped-decorator]
def _weigh(depth: tl.tensor) -> tl.tensor:
    """exp(l) in units of 2^-44, int64, to about one unit in the last place of float32.

    l = n ln 2 + r with |r| <= ln 2 / 2, and exp(r) by its series. Like counter_noise.py without a device's own exp.
    """
    scaled = tl.maximum(-(depth.to(tl.float32, bitcast=True)), LOWEST)
    n = tl.floor(scaled * LOG2E + 0.5)
    r = (scaled - n * LN2_HIGH) - n * LN2_LOW
    series = 1 / 120 + r * (1 / 720 + r * (1 / 5040))
    series = 1.0 + r * (1.0 + r * (0.5 + r * (1 / 6 + r * (1 / 24 + r * series))))
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    weight = (series * power * WEIGHT_UNITS).to(tl.int64)
    return tl.where(scaled > LOWEST, weight, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _first_depths(cut: tl.tensor) -> tl.tensor:
    """[WAYS] int32, ascending: powers of two of |l|, none beyond the cut so far, which comes last."""
    ways = tl.arange(0, WAYS)
    return tl.where(ways == WAYS - 1, cut, tl.minimum((FIRST_EXPONENT + ways) << 23, cut))


@triton.jit  # type: ignore[untyped-decorator]
def _even_depths(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """[WAYS] int32, ascending: from just above `low` to `high`, which comes last."""
    ways = (tl.arange(0, WAYS) + 1).to(tl.int64)
    return low + ((high.to(tl.int64) - low) * ways // WAYS).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _between(
    depths: tl.tensor, totals: tl.tensor, target: tl.tensor, low: tl.tensor, high: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """(low, high] after a round: its weights up to `depths` were `totals`."""
    has_reached = totals >= target
    low = tl.maximum(low, tl.max(tl.where(has_reached, -1, depths), 0))
    high = tl.minimum(high, tl.min(tl.where(has_reached, depths, high), 0))
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def _sum_up(weights: tl.tensor, row: tl.tensor, SPLITS: tl.constexpr) -> tl.tensor:
    """[WAYS] int64: the row's weights of all its programs, [rows, SPLITS, WAYS]."""
    places = tl.arange(0, SPLITS)[:, None] * WAYS + tl.arange(0, WAYS)[None, :]
    return tl.sum(tl.load(weights + row.to(tl.int64) * (SPLITS * WAYS) + places), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _range(
    row: tl.tensor,
    cut: tl.tensor,
    limit: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    ROUNDS: tl.constexpr,
    IS_TOP_P: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(low, high, weight up to low, target) after the first ROUNDS rounds of narrowing."""
    totals = _sum_up(first, row, SPLITS)
    if IS_TOP_P:
        whole = tl.max(totals, 0)
        target = tl.ceil(whole.to(tl.float64) * limit).to(tl.int64)
    else:
        # Where fewer are left than k, no depth reaches it, and the cut stays.
        target = limit.to(tl.int64)
    start = tl.full([], -1, tl.int32)
    low, high = _between(_first_depths(cut), totals, target, start, cut)
    below = tl.max(tl.where(totals >= target, 0, totals), 0)
    if ROUNDS > 1:
        totals = _sum_up(second, row, SPLITS)
        depths = _even_depths(low, high)
        low, high = _between(depths, totals, target, low, high)
        below = tl.maximum(below, tl.max(tl.where(totals >= target, 0, totals), 0))
    return low, high, below, target


@triton.jit  # type: ignore[untyped-decorator]
def _is_limit(limit: tl.tensor, IS_TOP_P: tl.constexpr) -> tl.tensor:
    """Whether a row's top_p or top_k cuts anything."""
    return limit < 1 if IS_TOP_P else limit > 0


@triton.jit  # type: ignore[untyped-decorator]
def _narrow(
    logits: tl.tensor,
    maxima: tl.tensor,
    temperatures: tl.tensor,
    cuts: tl.tensor,
    limits: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    counts: tl.tensor,
    vocab: tl.tensor,
    chunk: tl.tensor,
    IS_FIRST: tl.constexpr,
    IS_TOP_P: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Weighs one program's part of a row up to each of WAYS depths. The first round also clears `counts`."""
    row, split = tl.program_id(0), tl.program_id(1)
    limit = tl.load(limits + row)
    if _is_limit(limit, IS_TOP_P):
        cut = tl.load(cuts + row)
        if IS_FIRST:
            depths = _first_depths(cut)
            if split == 0:
                tl.store(counts + row, 0)
        else:
            low, high, _, _ = _range(row, cut, limit, first, second, 1, IS_TOP_P, SPLITS)
            depths = _even_depths(low, high)
        largest = tl.max(tl.load(maxima + row * SPLITS + tl.arange(0, SPLITS)), 0)
        temperature = tl.load(temperatures + row)
        total = tl.zeros([WAYS, TILE], tl.int64 if IS_TOP_P else tl.int32)
        for begin in range(split * chunk, tl.minimum((split + 1) * chunk, vocab), TILE):
            token_ids = begin + tl.arange(0, TILE)
            is_real = token_ids < vocab
            values = tl.load(logits + row.to(tl.int64) * vocab + token_ids, mask=is_real, other=float("-inf"))
            depth = tl.where(is_real, depth_of(scale(values, largest, temperature)), NO_DEPTH)
            if IS_TOP_P:
                total += tl.where(depth[None, :] <= depths[:, None], _weigh(depth)[None, :], 0)
            else:
                total += (depth[None, :] <= depths[:, None]).to(tl.int32)
        weights = first if IS_FIRST else second
        place = weights + (row.to(tl.int64) * SPLITS + split) * WAYS + tl.arange(0, WAYS)
        tl.store(place, tl.sum(total, 1).to(tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def _compact(
    logits: tl.tensor,
    maxima: tl.tensor,
    temperatures: tl.tensor,
    cuts: tl.tensor,
    limits: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    counts: tl.tensor,
    depths: tl.tensor,
    vocab: tl.tensor,
    chunk: tl.tensor,
    IS_TOP_P: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Appends what is still in between to the row's list in `depths` [rows, vocab], in any order."""
    row, split = tl.program_id(0), tl.program_id(1)
    limit = tl.load(limits + row)
    if _is_limit(limit, IS_TOP_P):
        low, high, _, _ = _range(row, tl.load(cuts + row), limit, first, second, 2, IS_TOP_P, SPLITS)
        largest = tl.max(tl.load(maxima + row * SPLITS + tl.arange(0, SPLITS)), 0)
        temperature = tl.load(temperatures + row)
        line = row.to(tl.int64) * vocab
        for begin in range(split * chunk, tl.minimum((split + 1) * chunk, vocab), TILE):
            token_ids = begin + tl.arange(0, TILE)
            is_real = token_ids < vocab
            values = tl.load(logits + line + token_ids, mask=is_real, other=float("-inf"))
            depth = depth_of(scale(values, largest, temperature))
            is_between = is_real & (depth > low) & (depth <= high)
            ones = is_between.to(tl.int32)
            start = tl.atomic_add(counts + row, tl.sum(ones, 0), sem="relaxed")
            tl.store(depths + line + start + tl.cumsum(ones, 0) - 1, depth, mask=is_between)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(
    cuts: tl.tensor,
    limits: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    counts: tl.tensor,
    depths: tl.tensor,
    found: tl.tensor,
    vocab: tl.tensor,
    IS_TOP_P: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """found[row] = its cut, which stays as it was where nothing cuts."""
    row = tl.program_id(0)
    limit = tl.load(limits + row)
    cut = tl.load(cuts + row)
    if _is_limit(limit, IS_TOP_P):
        low, high, below, target = _range(row, cut, limit, first, second, 2, IS_TOP_P, SPLITS)
        count = tl.load(counts + row)
        while high - low > 1:
            asked = _even_depths(low, high)
            total = tl.zeros([WAYS, TILE], tl.int64 if IS_TOP_P else tl.int32)
            for begin in range(0, count, TILE):
                index = begin + tl.arange(0, TILE)
                depth = tl.load(depths + row.to(tl.int64) * vocab + index, mask=index < count, other=NO_DEPTH)
                if IS_TOP_P:
                    total += tl.where(depth[None, :] <= asked[:, None], _weigh(depth)[None, :], 0)
                else:
                    total += (depth[None, :] <= asked[:, None]).to(tl.int32)
            low, high = _between(asked, below + tl.sum(total, 1).to(tl.int64), target, low, high)
        cut = high
    tl.store(found + row, cut)


def find_cuts(logits: torch.Tensor, inputs: SampleInputs, maxima: torch.Tensor, split: Split) -> torch.Tensor:
    """The depth of the last kept token of every row [rows] int32.

    `logits` [rows, vocab] float32 contiguous are the edited ones, `maxima` [rows, split.count] float32 the largest of
    each program's part.
    """
    shape = inputs.shape
    rows, vocab = logits.shape
    assert logits.dtype == torch.float32, f"logits are float32, not {logits.dtype}"
    assert logits.is_contiguous(), "a row of logits follows the other"
    assert vocab <= VOCAB_MAX, f"{vocab} tokens are more than {VOCAB_MAX}"
    assert maxima.shape == (rows, split.count), f"maxima {tuple(maxima.shape)} for {rows} rows"
    cuts = inputs.min_p_cuts
    if not (shape.any_top_k or shape.any_top_p):
        return cuts
    device, chunk = logits.device, split.chunk(vocab)
    first, second = torch.empty(2, rows, split.count, WAYS.value, dtype=torch.int64, device=device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    depths = torch.empty(rows, vocab, dtype=torch.int32, device=device)
    row_of = (logits, maxima, inputs.temperatures)
    for wanted, limits, is_top_p in (
        (shape.any_top_k, inputs.top_k, False),
        (shape.any_top_p, inputs.top_p, True),
    ):
        if not wanted:
            continue
        found = torch.empty(rows, dtype=torch.int32, device=device)
        weights = (cuts, limits, first, second, counts)
        # The same weights on every device.
        sizes = {"SPLITS": split.count, "TILE": TILE, "num_warps": NUM_WARPS, "enable_fp_fusion": False}
        _narrow[(rows, split.count)](*row_of, *weights, vocab, chunk, IS_FIRST=True, IS_TOP_P=is_top_p, **sizes)
        _narrow[(rows, split.count)](*row_of, *weights, vocab, chunk, IS_FIRST=False, IS_TOP_P=is_top_p, **sizes)
        _compact[(rows, split.count)](*row_of, *weights, depths, vocab, chunk, IS_TOP_P=is_top_p, **sizes)
        _finish[(rows,)](*weights, depths, found, vocab, IS_TOP_P=is_top_p, **sizes)
        cuts = found
    return cuts
