"""How much longer steps take than the profile says, from one run: the scales whose emulation has that run's latencies.

A worker's own scales, as it reports them, are those of its last steps, when the load has gone. A whole run says more.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Not the extremes: one request too late for everything would be most of the distance.
LEVELS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
PROMPTS = (0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25)
DECODES = (0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
FINER = 0.5


@dataclass(frozen=True, slots=True)
class Scales:
    """Times of prompts and of decode rows, over what the profile says."""

    prompts: float
    decodes: float


@dataclass(frozen=True, slots=True)
class Latencies:
    """TTFT and TPOT in seconds of the requests of a run that had them."""

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]


def fit_scales(real: Latencies, emulate: Callable[[Scales, int], Latencies], noises: int = 3) -> Scales:
    """The nearest on a grid, then the nearest of what lies between there and its neighbours.

    `emulate` takes scales and a seed for the noise of steps; the second round takes the mean of several.
    """
    around = [Scales(prompts, decodes) for prompts, decodes in itertools.product(PROMPTS, DECODES)]
    best = min(around, key=lambda scales: distance(real, [emulate(scales, 0)]))
    prompt_step, decode_step = FINER * (PROMPTS[1] - PROMPTS[0]), FINER * (DECODES[1] - DECODES[0])
    between = [
        Scales(best.prompts + i * prompt_step, best.decodes + j * decode_step)
        for i, j in itertools.product((-1, 0, 1), repeat=2)
    ]
    return min(between, key=lambda scales: distance(real, [emulate(scales, noise) for noise in range(noises)]))


def distance(real: Latencies, emulated: Sequence[Latencies]) -> float:
    """Mean |log| of the ratios of quantiles, TTFT's and TPOT's added; infinite where either has nothing."""
    return sum(
        _apart(own, others)
        for own, others in (
            (real.ttft_s, [run.ttft_s for run in emulated]),
            (real.tpot_s, [run.tpot_s for run in emulated]),
        )
    )


def _apart(real: Sequence[float], emulated: Sequence[Sequence[float]]) -> float:
    if not real or not all(emulated):
        return math.inf
    return statistics.fmean(
        abs(math.log(statistics.fmean(_quantile(run, level) for run in emulated) / _quantile(real, level)))
        for level in LEVELS
    )


def _quantile(values: Sequence[float], level: float) -> float:
    return sorted(values)[int(level * (len(values) - 1))]
