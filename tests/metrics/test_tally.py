"""Classes of values, and what is counted of the tokens that come."""

from __future__ import annotations

import asyncio
import math

import pytest

from cluster.answer import Answer
from cluster.tally import Tally
from cluster.token_flow import TokenFlow
from decode_worker.stream import Delta
from engine.batch import Sampled
from engine.errors import Unavailable
from engine.request import FinishReason
from engine.sampling import SamplingParams
from tests.cluster.fake_decode import STEP_S, FakeDecode, on_virtual_time
from tests.cluster.serving import ANSWER, LENGTH, TO_THE_END, TOKENIZER, serving, start


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


@on_virtual_time
async def test_an_answer_that_goes_on_elsewhere_has_one_first_token_and_one_long_gap() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, ("p", "d1", "d2")) as gateway:
        task = start(gateway, "r", params=TO_THE_END.params)
        await asyncio.sleep(4.5 * STEP_S)
        drawn = gateway.flow.generation_tokens
        assert 0 < drawn < LENGTH, "tokens are counted as they come"
        [first] = fake.attached
        fake.break_link(first, Unavailable("connection reset"))
        _, complete = await task
        flow = gateway.flow
    assert complete.receipt.retries == 1
    assert (flow.ttfts.count, flow.prompt_tokens) == (1, complete.usage.prompt_tokens)
    assert flow.ttfts.sum == pytest.approx(complete.receipt.ttft_s)
    assert (flow.gaps.count, flow.generation_tokens) == (LENGTH - 1, LENGTH)
    assert flow.gaps.sum == pytest.approx(complete.receipt.tpot_s * (LENGTH - 1))
