"""How much longer steps take than the profile says, from one run: the scales whose emulation has that run's latencies.

A worker's own scales, as it reports them, are those of its last steps, when the load has gone. A whole run says more:
each request is compared with itself, really served and emulated, and the scales are moved by the median ratios until
these are 1. What a request waits for others grows faster than their work, hence steps that are shorter than the ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

ROUNDS = 6
PROMPT_STEP, DECODE_STEP = 0.6, 0.8


@dataclass(frozen=True, slots=True)
class Scales:
    """Times of prompts and of decode rows, over what the profile says."""

    prompts: float
    decodes: float


@dataclass(frozen=True, slots=True)
class Latency:
    """TTFT and TPOT of one request in seconds; None for a request that has none."""

    ttft_s: float | None
    tpot_s: float | None


def fit_scales(
    real: Sequence[Latency], emulate: Callable[[Scales, int], Sequence[Latency]], noises: Sequence[int] = (0, 1)
) -> Scales:
    """`emulate` takes scales and a seed for the noise of steps, and tells of the same requests in the same order.
    Raises ValueError where no request was answered on both sides."""
    scales = Scales(1.0, 1.0)
    for _ in range(ROUNDS):
        runs = [emulate(scales, noise) for noise in noises]
        prompts = statistics.median(_ratios((a.ttft_s, b.ttft_s) for run in runs for a, b in _pairs(real, run)))
        decodes = statistics.median(_ratios((a.tpot_s, b.tpot_s) for run in runs for a, b in _pairs(real, run)))
        scales = Scales(
            scales.prompts * math.exp(PROMPT_STEP * prompts), scales.decodes * math.exp(DECODE_STEP * decodes)
        )
    return scales


def _pairs(real: Sequence[Latency], run: Sequence[Latency]) -> Iterator[tuple[Latency, Latency]]:
    return zip(real, run, strict=True)


def _ratios(pairs: Iterator[tuple[float | None, float | None]]) -> list[float]:
    """ln(real / emulated) of those that have both."""
    found = [math.log(real / emulated) for real, emulated in pairs if real and emulated]
    if not found:
        raise ValueError("no request was answered both really and in the emulation")
    return found
