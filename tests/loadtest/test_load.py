"""Arrivals, lengths and prompts."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from statistics import fmean, stdev

import pytest

from cluster.loadtest.load import Load, Process
from cluster.loadtest.prompts import WORDS, FilePrompts, RandomTokens, RandomWords
from cluster.loadtest.request import chat_of, token_ids_of
from cluster.planning.trace import TraceRequest
from cluster.prompt_file import PromptLine

TOKENS = RandomTokens(50_000)


def poisson(count: int, **lengths: int) -> Load:
    row = TraceRequest(None, lengths.get("prompt", 16), lengths.get("output", 8))
    return Load((row,) * count, Process(count))


@pytest.mark.parametrize("rate", [0.5, 7.0])
def test_the_rate_is_exact_and_the_pattern_the_seeds(rate: float) -> None:
    times = [request.arrival_s for request in poisson(200).requests(rate, 3, "a", TOKENS)]
    assert times[0] == 0.0
    assert 199 / times[-1] == pytest.approx(rate)
    gaps = [after - before for before, after in pairwise(times)]
    assert stdev(gaps) / fmean(gaps) == pytest.approx(1.0, abs=0.25)
    slower = [request.arrival_s for request in poisson(200).requests(rate / 2, 3, "a", TOKENS)]
    assert slower == pytest.approx([2 * time for time in times])
    assert times != [request.arrival_s for request in poisson(200).requests(rate, 4, "a", TOKENS)]


def test_a_bursty_process_has_its_variation() -> None:
    load = Load((TraceRequest(None, 4, 4),) * 3000, Process(3000, "gamma", 3.0))
    times = [request.arrival_s for request in load.requests(2.0, 1, "a", TOKENS)]
    gaps = [after - before for before, after in pairwise(times)]
    assert stdev(gaps) / fmean(gaps) == pytest.approx(3.0, rel=0.2)


def test_prompts_have_their_length_and_never_come_twice() -> None:
    load = poisson(50)
    prompts = [request.prompt for run in ("a", "b") for request in load.requests(1.0, 0, run, TOKENS)]
    assert {len(prompt) for prompt in prompts} == {16}
    assert Counter(prompts).most_common(1)[0][1] == 1
    assert all(1000 <= token_id < 47_500 for prompt in prompts for token_id in token_ids_of(prompt))
    again = [request.prompt for request in load.requests(9.0, 0, "a", TOKENS)]
    assert again == prompts[:50]


def test_a_tiny_vocabulary_still_has_ids() -> None:
    prompt, tokens = RandomTokens(3).prompt(5, (), random.Random(0))
    assert tokens == 5
    assert set(token_ids_of(prompt)) <= {0, 1, 2}


def test_prefix_hashes_are_honoured() -> None:
    rows = (
        TraceRequest(0.0, 1100, 1, (7, 8, 9)),
        TraceRequest(1.0, 1536, 1, (7, 8, 10)),
        TraceRequest(2.0, 512, 1, (11,)),
    )
    first, second, third = (token_ids_of(request.prompt) for request in Load(rows, None).requests(1.0, 0, "a", TOKENS))
    assert [len(ids) for ids in (first, second, third)] == [1100, 1536, 512]
    assert first[:1024] == second[:1024]
    assert first[1024:] != second[1024:1100]
    assert third[:16] != first[:16]


def test_a_trace_keeps_its_gaps_and_takes_the_rate() -> None:
    rows = tuple(TraceRequest(time, 4, 4) for time in (10.0, 11.0, 11.0, 14.0))
    load = Load(rows, None)
    assert load.own_rate_rps == pytest.approx(0.75)
    assert [request.arrival_s for request in load.requests(0.75, 0, "a", TOKENS)] == pytest.approx([0, 1, 1, 4])
    assert [request.arrival_s for request in load.requests(3.0, 0, "a", TOKENS)] == pytest.approx([0, 0.25, 0.25, 1])


def test_what_is_too_long_for_the_model_is_left_out() -> None:
    rows = (TraceRequest(0.0, 90, 10), TraceRequest(1.0, 91, 10), TraceRequest(2.0, 4, 4))
    load = Load(rows, None, max_context=100)
    assert load.left_out == 1
    assert [request.arrival_s for request in load.requests(0.5, 0, "a", TOKENS)] == [0.0, 2.0]


def test_words() -> None:
    prompt, tokens = RandomWords().prompt(40, (), random.Random(0))
    assert isinstance(prompt, str)
    assert tokens == 0
    assert len(prompt.split(" ")) == 40
    assert set(prompt.split(" ")) <= set(WORDS)


def test_marked_prompts_differ_from_those_of_other_marks() -> None:
    lines = [PromptLine("a", "text"), PromptLine("b", (("user", "hi"),)), PromptLine("c", (5, 6))]
    given = [
        source.prompt(1, (), random.Random(0))[0]
        for mark in ("x", "y")
        for source in [FilePrompts(lines, random.Random(0), mark)]
        for _ in range(4)
    ]
    assert len(set(given)) == 8
    assert not {"text", (("user", "hi"),), (5, 6)} & set(given)
    assert sum(isinstance(prompt, str) and prompt.startswith("(x ") for prompt in given) >= 1


def test_a_files_prompts_come_again_with_a_number() -> None:
    lines = [PromptLine("a", "text"), PromptLine("b", (("user", "hi"), ("assistant", "yes"))), PromptLine("c", (5, 6))]
    source = FilePrompts(lines, random.Random(0))
    given = [source.prompt(1, (), random.Random(0))[0] for _ in range(6)]
    assert set(given[:3]) == {"text", (("user", "hi"), ("assistant", "yes")), (5, 6)}
    assert len(set(given)) == 6
    again = given[3:]
    assert any(isinstance(prompt, str) and prompt.endswith(") text") for prompt in again)
    chats = [chat for prompt in again if (chat := chat_of(prompt)) is not None]
    assert [turn["role"] for turn in chats[0]] == ["user", "assistant"]
    assert chats[0][0]["content"].endswith(") hi")
    assert any(token_ids_of(prompt)[-2:] == [5, 6] for prompt in again)


def test_runs_share_what_the_trace_says_among_their_own_prompts_only() -> None:
    rows = (TraceRequest(0.0, 600, 4, (1, 2)), TraceRequest(1.0, 600, 4, (1, 3)))
    load = Load(rows, None)
    (first, second), (other, _) = (load.requests(1.0, 0, run, TOKENS) for run in ("a", "b"))
    heads = [token_ids_of(request.prompt)[:512] for request in (first, second, other)]
    assert heads[0] == heads[1]
    assert heads[0] != heads[2], "a prefix cache would know the second run's prompts"
    assert token_ids_of(first.prompt)[512:] != token_ids_of(second.prompt)[512:]
    assert load.requests(2.0, 0, "a", TOKENS)[0].prompt == first.prompt


def test_no_rows_are_no_requests() -> None:
    assert Load((TraceRequest(0.0, 5, 5),), None).head(0).requests(1.0, 0, "warm-up", TOKENS) == ()
