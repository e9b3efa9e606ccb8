"""DistServe's rules by hand, and the length sample's promises."""

from __future__ import annotations

import pytest

from bench.distserve_rules import best_rate_rps
from bench.sharegpt_lengths import MEAN_OUTPUT, MEAN_PROMPT, MOST_TOKENS, as_trace, mean, sharegpt_like
from engine.objectives import Objectives
from engine.step_cost import StepWork

LENGTHS = [(100, 10)] * 300


def prompt_s(work: StepWork) -> float:
    return 1e-3 * work.prompt_tokens


def step_s(work: StepWork) -> float:
    return 0.01


def free_s(work: StepWork) -> float:
    return 0.0


def test_rates_are_multiples_of_the_last_bracket() -> None:
    """From 0 to 5 until narrower than 0.25: the answer for each GPU is a multiple of 5/32."""
    rate = best_rate_rps(LENGTHS, 2, Objectives(0.25, 0.1), prompt_s, step_s) / 2
    assert rate > 0
    assert rate / (5 / 32) == pytest.approx(round(rate / (5 / 32)))


def test_objectives_below_a_step_are_never_kept() -> None:
    """A prompt takes 101 ms with the simulator's extra millisecond, a step 10 ms."""
    assert best_rate_rps(LENGTHS, 1, Objectives(0.1, 0.1), prompt_s, step_s) == 0.0
    assert best_rate_rps(LENGTHS, 1, Objectives(0.2, 0.009), prompt_s, step_s) == 0.0


def test_waiting_prompts_share_a_step() -> None:
    """With a prompt's time fixed, batching lets any rate through: the search ends at its top."""
    fixed = best_rate_rps(LENGTHS, 1, Objectives(0.25, 1.0), lambda _: 0.1, free_s, precision=0.02)
    assert fixed > 4.9


def test_colocated_prompts_hold_up_decoding() -> None:
    """The same times and twice the GPUs apart: a prompt's 100 ms are spread over ten tokens of each who decodes."""
    objectives = Objectives(0.5, 0.03)
    apart = best_rate_rps(LENGTHS, 2, objectives, prompt_s, step_s, precision=0.05)
    together = best_rate_rps(LENGTHS, 1, objectives, prompt_s, step_s, colocated=True, precision=0.05)
    assert together < apart / 2


@pytest.mark.parametrize("seed", [0, 1])
def test_lengths_have_the_published_means(seed: int) -> None:
    lengths = sharegpt_like(300, seed)
    assert mean(row[0] for row in lengths) == pytest.approx(MEAN_PROMPT, rel=0.01)
    assert mean(row[1] for row in lengths) == pytest.approx(MEAN_OUTPUT, rel=0.01)
    assert max(sum(row) for row in lengths) <= MOST_TOKENS
    assert lengths == sharegpt_like(300, seed)
    assert not as_trace(lengths).has_arrivals
