"""The split against a single process on the real model, float32: 200 of the shared prompts, greedy and sampled."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from engine.config import EngineConfig
from engine.engine import load_engine
from engine.generate import Answer, Generator, Prompt
from engine.sampling import SamplingParams
from engine.tokenizer import Tokenizer, load
from prefill_worker.config import PrefillConfig
from tests.golden import snapshot
from tests.golden.default_model import require_default_model
from tests.pair import Outcome, pair

COUNT = 200
PROMPT_TOKENS = 256
ANSWER_TOKENS = 16
# Where the two best candidates are this close, another batch shape may turn them round.
TIE = 1e-3

pytestmark = [pytest.mark.model, pytest.mark.nightly, pytest.mark.timeout(3600)]


def make_prompts(tokenizer: Tokenizer) -> list[Prompt]:
    """Two thirds greedy. Drawn again and again from the snapshot's sources, so that some prefixes are shared."""
    if not snapshot.PROMPTS.exists():
        pytest.skip(f"{snapshot.PROMPTS} is not here")
    rng = random.Random(3)
    texts = [ids for _, _, ids in snapshot.prompts(tokenizer)]
    prompts = []
    for index in range(COUNT):
        ids = rng.choice(texts)
        start = rng.choice([0, 0, rng.randrange(len(ids) // 2 + 1)])
        token_ids = tuple(ids[start : start + rng.randrange(1, PROMPT_TOKENS)])
        temperature = rng.choice([0.0, 0.0, 0.8])
        params = SamplingParams(temperature=temperature, max_tokens=ANSWER_TOKENS, ignore_eos=True, logprobs=2)
        prompts.append(Prompt(token_ids, params, seed=index))
    return prompts


def same_or_tie(expected: Answer, outcome: Outcome) -> bool:
    """Whether tokens agree up to a greedy tie, after which nothing can be compared. True for full agreement."""
    ours = outcome.token_ids[0]
    for position, (right, token_id) in enumerate(zip(expected.tokens, ours, strict=True)):
        if right.token_id != token_id:
            (_, best), (_, second) = right.top[:2]
            is_tie = expected.prompt.params.is_greedy and best - second < TIE
            assert is_tie, f"token {position}: {token_id} instead of {right.token_id}, gap {best - second:.2g}"
            return False
    return True


def make_engine(kv_cache_bytes: int):
    return load_engine(EngineConfig(kv_cache_bytes=kv_cache_bytes), require_default_model())


@pytest.mark.parametrize(
    ("budget", "prefix_cache", "decode_bytes"),
    [
        pytest.param(512, False, 512 << 20, id="whole"),
        pytest.param(64, True, 512 << 20, id="chunked-cached"),
        pytest.param(64, True, 48 << 20, id="chunked-cached-preempted"),
    ],
)
async def test_200_prompts(budget: int, prefix_cache: bool, decode_bytes: int) -> None:
    tokenizer = load(require_default_model())
    prompts = make_prompts(tokenizer)
    engines = [make_engine(size) for size in (512 << 20, 512 << 20, decode_bytes)]
    single, prefill_side, decode_side = (engine.runner for engine in engines)
    context = engines[0].model.max_context
    generator = Generator(single, frozenset(), context, token_budget=budget, prefix_cache=False)
    expected = [
        answers[0] for start in range(0, COUNT, 16) for answers in await generator.generate(prompts[start : start + 16])
    ]
    config = PrefillConfig(token_budget=budget, max_queued=COUNT)
    async with pair(
        prefill_side, decode_side, max_context=context, prefill_config=config, prefix_cache=prefix_cache
    ) as workers:
        outcomes = await workers.answer(prompts)
    report(expected, outcomes)
    if decode_bytes < 512 << 20:
        assert sum(outcome.receipt.preemptions for outcome in outcomes if outcome.receipt)
    for engine in engines:
        await engine.runner.close()


def report(expected: Sequence[Answer], outcomes: Sequence[Outcome]) -> None:
    ties = [
        index
        for index, (right, ours) in enumerate(zip(expected, outcomes, strict=True))
        if not same_or_tie(right, ours)
    ]
    print(f"{len(expected) - len(ties)} of {len(expected)} identical; greedy ties at {ties}")
