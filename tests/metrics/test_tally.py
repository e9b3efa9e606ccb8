"""Classes of values, and what is counted of the tokens that come."""

from __future__ import annotations

import math

from cluster.answer import Answer
from cluster.tally import Tally
from cluster.token_flow import TokenFlow
from decode_worker.stream import Delta
from engine.batch import Sampled
from engine.request import FinishReason
from engine.sampling import SamplingParams
from tests.cluster.serving import ANSWER, TOKENIZER


def test_a_value_on_a_bound_is_below_it() -> None:
    tally = Tally((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, math.inf):
        tally.add(value)
    assert tally.cumulative() == [(1.0, 2), (2.0, 4), (math.inf, 6)]
    assert (tally.count, tally.sum) == (6, math.inf)


def delta(choice: int, *tokens: int, reason: FinishReason | None = None) -> Delta:
    return Delta("r", choice, tuple(Sampled(token) for token in tokens), reason)


def test_a_gap_is_between_tokens_of_one_choice() -> None:
    flow = TokenFlow()
    answer = Answer(SamplingParams(n=2), TOKENIZER, flow)
    answer.add(delta(0, ANSWER[0]), 10.0)
    answer.add(delta(1, ANSWER[0]), 10.5)
    assert flow.gaps.count == 0, "nobody has waited between tokens yet"
    answer.add(delta(0, ANSWER[1]), 11.0)
    answer.add(delta(1, ANSWER[1], ANSWER[2]), 12.0)
    assert (flow.gaps.count, flow.gaps.sum) == (2, 2.5)
    # The word of an end brings no token, and so no gap.
    answer.add(delta(0, reason=FinishReason.LENGTH), 20.0)
    assert flow.gaps.count == 2
    assert flow.generation_tokens == 5


def test_tokens_that_no_client_sees_are_not_counted() -> None:
    flow = TokenFlow()
    answer = Answer(SamplingParams(stop=(",",)), TOKENIZER, flow)
    chunk = answer.add(delta(0, *ANSWER), 1.0)
    assert chunk is not None
    assert flow.generation_tokens == len(chunk.tokens) < len(ANSWER)
    answer.add(delta(0, ANSWER[0]), 2.0)
    assert flow.generation_tokens == len(chunk.tokens)
    assert flow.gaps.count == 0
