"""The single-process reference on the emulated runner, whose right answers are known."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import InvalidArgument
from engine.generate import Generator, Prompt
from engine.request import FinishReason
from engine.sampling import SamplingParams
from tests.emulated import runner


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("length", [1, 4, 7, 8, 9, 30])
def test_right_tokens(length: int, n: int) -> None:
    emulated = runner(64)
    params = SamplingParams(temperature=0.9, n=n, max_tokens=11)
    prompts = [Prompt(tuple(range(length)), params, seed) for seed in range(3)]
    answers = asyncio.run(Generator(emulated, frozenset({0}), 256, token_budget=8).generate(prompts))
    for prompt, choices in zip(prompts, answers, strict=True):
        for answer in choices:
            right = emulated.expected_tokens(prompt.token_ids, params, prompt.seed, answer.choice, 11)
            assert answer.token_ids == list(right)
            assert answer.finish_reason is FinishReason.LENGTH


def test_more_prompts_than_the_pool_holds_run_in_waves() -> None:
    emulated = runner(16)
    params = SamplingParams(temperature=0.0, max_tokens=8)
    prompts = [Prompt((number, *range(20)), params) for number in range(9)]
    answers = asyncio.run(Generator(emulated, frozenset(), 256).generate(prompts))
    assert [choices[0].token_ids for choices in answers] == [
        list(emulated.expected_tokens(prompt.token_ids, params, 0, 0, 8)) for prompt in prompts
    ]


def test_stop_tokens_and_the_context_end_an_answer() -> None:
    emulated = runner(64)
    params = SamplingParams(temperature=0.0, max_tokens=50)
    tokens = emulated.expected_tokens((1, 2, 3), params, 0, 0, 50)
    stopping = SamplingParams(temperature=0.0, max_tokens=50, stop_token_ids=(tokens[4],))
    single = Generator(emulated, frozenset(), 10)
    (stopped,), (cut,) = asyncio.run(single.generate([Prompt((1, 2, 3), stopping), Prompt((1, 2, 3), params)]))
    assert (stopped.finish_reason, stopped.token_ids) == (FinishReason.STOP, list(tokens[:5]))
    assert (cut.finish_reason, len(cut.token_ids)) == (FinishReason.LENGTH, 7)


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at most 16"):
        asyncio.run(Generator(runner(4), frozenset(), 256).generate([Prompt((1,) * 10, SamplingParams(max_tokens=7))]))
