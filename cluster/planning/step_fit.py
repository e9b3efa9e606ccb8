"""Fits a step-time law to measured steps: non-negative least squares on relative errors.

    seconds = tokens(all tokens of the step) + drawn(rows drawn from) + prompts · p
            + pairs · a + context of prompt rows · b + decode rows · r + decode context · c

`tokens` and `drawn` are straight lines between knots that never fall: a matrix product takes the larger of its reading
and its arithmetic, and kernels differ by size. Every coefficient is at least 0, so a law never predicts less time for
more work, wherever it is asked. Relative errors, as in DistServe's fits: a small step matters as much as a large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cluster.planning.measured_law import Rises, StepTerms, drawn_rows, pairs_of
from engine.step_cost import StepWork

Array = NDArray[np.float64]

TOKEN_KNOTS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
DRAWN_KNOTS = (0, 1, 8, 16, 32, 64, 128, 256)
LINEAR_TERMS = ("prompt_step", "prompt", "pair", "prompt_context", "decode_row", "decode_context")
# Sweeps of coordinate descent, and the relative change at which they end.
SWEEPS = 3000
TOLERANCE = 1e-9
# A step that is off by more than this many medians counts less, by as much as it is off (Huber's weights).
OUTLIER_MEDIANS = 3.0
REWEIGHTINGS = 4


@dataclass(frozen=True, slots=True)
class Measured:
    """A step and the seconds that it really took: typically, and each time."""

    work: StepWork
    seconds: float
    samples: tuple[float, ...] = ()


def fit(steps: Sequence[Measured]) -> StepTerms:
    """The law nearest to these steps. They must hold prompts and decode rows of several sizes each."""
    token_knots = knots_for([step.work.token_count for step in steps], TOKEN_KNOTS)
    drawn_knots = knots_for([drawn_rows(step.work) for step in steps], DRAWN_KNOTS)
    matrix = np.array([_features(step.work, token_knots, drawn_knots) for step in steps])
    seconds = np.array([step.seconds for step in steps])
    weights = 1.0 / seconds
    for _ in range(REWEIGHTINGS):
        found = non_negative_least_squares(matrix * weights[:, None], seconds * weights)
        errors = np.abs(matrix @ found - seconds) / seconds
        limit = OUTLIER_MEDIANS * max(float(np.median(errors)), 1e-6)
        weights = np.sqrt(np.minimum(1.0, limit / np.maximum(errors, 1e-12))) / seconds
    t, d = len(token_knots) - 1, len(drawn_knots) - 1
    tokens, drawn, linear = found[:t], found[t : t + d], found[t + d :]
    return StepTerms(
        Rises(token_knots, (0.0, *map(float, np.cumsum(tokens)))),
        Rises(drawn_knots, (0.0, *map(float, np.cumsum(drawn)))),
        **dict(zip(LINEAR_TERMS, map(float, linear), strict=True)),
    )


def knots_for(counts: Sequence[int], knots: Sequence[int]) -> tuple[int, ...]:
    """Those knots between which there are counts, up to the largest count itself: a stretch without a step in it would
    be free to be anything."""
    kept = [knots[0]]
    for knot in knots[1:]:
        if any(kept[-1] < count <= knot for count in counts):
            kept.append(min(knot, max(counts)))
    return tuple(kept)


def _features(work: StepWork, token_knots: Sequence[int], drawn_knots: Sequence[int]) -> list[float]:
    linear = (
        float(bool(work.prompts)),
        len(work.prompts),
        pairs_of(work),
        sum(context for _, context in work.prompts),
        work.decode_rows,
        work.decode_context,
    )
    return [*_shares(work.token_count, token_knots), *_shares(drawn_rows(work), drawn_knots), *linear]


def _shares(count: int, knots: Sequence[int]) -> list[float]:
    """How much of each stretch between two knots lies below `count`; of the last, more than all where it is beyond."""
    shares = [min(max((count - low) / (high - low), 0.0), 1.0) for low, high in pairwise(knots)]
    if count > knots[-1]:
        shares[-1] = (count - knots[-2]) / (knots[-1] - knots[-2])
    return shares


def non_negative_least_squares(matrix: Array, target: Array) -> Array:
    """argmin |matrix · x − target| over x ≥ 0, by coordinate descent: one coefficient after another is set to its best
    (Franc, Hlaváč and Navara, Sequential Coordinate-wise Algorithm for NNLS, 2005). [rows, n], [rows] → [n]."""
    scale = np.sqrt((matrix**2).sum(axis=0))
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    gram, gradient = scaled.T @ scaled, -(scaled.T @ target)
    x = np.zeros(len(scale))
    for _ in range(SWEEPS):
        largest = 0.0
        for k in range(len(x)):
            if gram[k, k] == 0:
                continue
            step = max(0.0, x[k] - gradient[k] / gram[k, k]) - x[k]
            if step:
                x[k] += step
                gradient += step * gram[:, k]
                largest = max(largest, abs(step))
        if largest <= TOLERANCE * max(1.0, float(x.max())):
            break
    found: Array = x / scale
    return found
