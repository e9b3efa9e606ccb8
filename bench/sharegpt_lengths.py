"""A stand-in for DistServe's ShareGPT lengths, whose exact sample is not public here.

Known of it: prompts of 755 tokens on average and answers of 200 (paper, table of datasets), prompts are the turns of a
conversation so far, and prompt and answer together stay below 2,048 tokens. Taken here: both log-normal (many short, a
long tail), cut at 2,047, and scaled until the means agree.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from cluster.planning.trace import Trace, TraceRequest

MEAN_PROMPT, MEAN_OUTPUT = 755, 200
# Standard deviations of the lengths' logarithms.
PROMPT_SIGMA, OUTPUT_SIGMA = 0.9, 1.0
MOST_TOKENS = 2047
LEAST_TOKENS = 4


def sharegpt_like(count: int, seed: int = 0, prompt_sigma: float = PROMPT_SIGMA) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens): means within 1 % of DistServe's for 300 requests or more."""
    rng = random.Random(f"lengths {seed}")
    shapes = [(rng.lognormvariate(0, prompt_sigma), rng.lognormvariate(0, OUTPUT_SIGMA)) for _ in range(count)]
    prompt_scale, output_scale = float(MEAN_PROMPT), float(MEAN_OUTPUT)
    lengths: list[tuple[int, int]] = []
    for _ in range(40):
        lengths = [_cut(prompt_scale * prompt, output_scale * output) for prompt, output in shapes]
        prompt_scale *= MEAN_PROMPT / mean(row[0] for row in lengths)
        output_scale *= MEAN_OUTPUT / mean(row[1] for row in lengths)
    return lengths


def as_trace(lengths: Sequence[tuple[int, int]]) -> Trace:
    """Without arrivals."""
    return Trace(tuple(TraceRequest(None, prompt, output) for prompt, output in lengths))


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _cut(prompt: float, output: float) -> tuple[int, int]:
    answer = min(max(LEAST_TOKENS, round(output)), MOST_TOKENS // 2)
    return min(max(LEAST_TOKENS, round(prompt)), MOST_TOKENS - answer), answer
