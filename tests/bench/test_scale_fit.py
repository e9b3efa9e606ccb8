"""Scales are found again from latencies that they made."""

from __future__ import annotations

import math
import random

import pytest

from bench.scale_fit import DECODES, PROMPTS, Latencies, Scales, distance, fit_scales


def made(scales: Scales, noise: int) -> Latencies:
    rng = random.Random(noise)
    prompts = [rng.lognormvariate(-0.5, 0.4) for _ in range(100)]
    return Latencies(
        tuple(scales.prompts * prompt_s for prompt_s in prompts),
        # What a row waits for the prompts beside it is part of its TPOT.
        tuple(0.03 * scales.decodes + 0.02 * scales.prompts * prompt_s for prompt_s in prompts),
    )


@pytest.mark.parametrize("scales", [Scales(1.0, 1.1), Scales(1.175, 1.25), Scales(PROMPTS[0], DECODES[-1])])
def test_scales_are_found_again(scales: Scales) -> None:
    real = made(scales, 0)
    found = fit_scales(real, made, noises=1)
    assert (found.prompts, found.decodes) == pytest.approx((scales.prompts, scales.decodes))


def test_a_run_without_answers_is_infinitely_far() -> None:
    assert distance(made(Scales(1.0, 1.0), 0), [Latencies((), ())]) == math.inf
    assert distance(Latencies((), ()), [made(Scales(1.0, 1.0), 0)]) == math.inf
