"""Scales are found again from latencies that they made."""

from __future__ import annotations

import random

import pytest

from bench.scale_fit import Latency, Scales, fit_scales


def made(scales: Scales, noise: int) -> list[Latency]:
    """Queues: twice the work makes three times the wait. What a row waits for prompts beside it is part of its TPOT."""
    rng, loads = random.Random(noise), random.Random(7)
    found = []
    for number in range(200):
        work_s = scales.prompts * loads.lognormvariate(-0.5, 0.4)
        noisy = rng.lognormvariate(0.0, 0.05)
        found.append(Latency(noisy * work_s**1.5, noisy * (0.03 * scales.decodes + 0.01 * work_s)))
        if number % 10 == 0:
            found[-1] = Latency(None, None)
    return found


@pytest.mark.parametrize("scales", [Scales(1.0, 1.1), Scales(1.18, 1.25), Scales(0.93, 1.4)])
def test_scales_are_found_again(scales: Scales) -> None:
    found = fit_scales(made(scales, 5), made)
    assert (found.prompts, found.decodes) == (
        pytest.approx(scales.prompts, rel=0.02),
        pytest.approx(scales.decodes, rel=0.02),
    )


def test_a_run_without_answers_says_nothing() -> None:
    nothing = [Latency(None, None)] * 200
    with pytest.raises(ValueError, match="no request was answered"):
        fit_scales(nothing, made)
