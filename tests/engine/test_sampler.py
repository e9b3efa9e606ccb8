"""The sampler: right distribution, right order of operations, and draws that depend on (seed, choice, step) alone.

What takes `make` is asked of every sampler: test_device_sampler.py runs it again with one of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import pytest
import torch

from engine.batch import NO_TOKEN, Sampled, SampleSpec
from engine.random_draw import draw_key, gumbel_noise, hash_bits
from engine.sampler import Sampler
from engine.sampling import SamplingParams
from engine.structure import Mask, Structure

CPU = torch.device("cpu")
EOS = 1
VOCAB = 40
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2


class AnySampler(Protocol):
    def sample(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> tuple[tuple[Sampled, ...], ...]: ...


# From vocabulary size and end tokens.
Make = Callable[[int, tuple[int, ...]], AnySampler]


class EveryThird:
    """A guide that allows every third token, and which ones depends on how many came before. It loses `LOST`."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self.is_there = True

    def banned(self, structure: Structure, output_ids: Sequence[int]) -> Mask | None:
        return None if structure == LOST else (np.arange(self._vocab) + len(output_ids)) % 3 != 0


STRUCTURE = Structure("regex", "any")
LOST = Structure("regex", "none")


@pytest.fixture
def make() -> Make:
    return lambda vocab, eos: Sampler(vocab, eos, EveryThird(vocab))


def spec(step: int = 0, seed: int = 0, choices: tuple[int, ...] = (0,), **params: object) -> SampleSpec:
    return SampleSpec(SamplingParams(**params), seed, step, choices)  # type: ignore[arg-type]


def draw(make: Make, logits: torch.Tensor, one: SampleSpec) -> list[int]:
    """The token ids, one per choice, of a batch of one row."""
    sampler = make(len(logits), (EOS,))
    return [sampled.token_id for sampled in sampler.sample(logits[None], [one])[0]]


def draws(logits: torch.Tensor, count: int, **params: object) -> torch.Tensor:
    """How often each token is drawn in so many steps, [vocab]."""
    sampler = Sampler(len(logits), ())
    drawn = []
    for first in range(0, count, 500):
        specs = [spec(step=step, **params) for step in range(first, first + 500)]
        rows = sampler.sample(logits.expand(500, -1), specs)
        drawn += [row[0].token_id for row in rows]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits))


def assert_follows(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square within five standard deviations of its mean; what cannot be drawn is not."""
    assert (counts[probabilities == 0] == 0).all()
    expected = (probabilities * counts.sum())[probabilities > 0]
    chi_square = ((counts[probabilities > 0] - expected) ** 2 / expected).sum().item()
    freedom = max(1, len(expected) - 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


# ── the noise ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hash_is_the_documented_one() -> None:
    """The formula once more in plain integers: what a kernel in another language must reproduce."""
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    for seed, choice, step in ((0, 0, 0), (-1, 3, 1000), ((1 << 63) - 1, 63, 1 << 30), (-(1 << 63), 0, 5)):
        key = mix((seed + golden) & mask)
        key = mix((key + choice * golden + golden) & mask)
        key = mix((key + step * golden + golden) & mask)
        assert draw_key(seed, choice, step) == key
        expected = [mix((key + (v + 1) * golden) & mask) >> 32 for v in range(1000)]
        assert hash_bits([key], 1000, CPU)[0].tolist() == expected


def test_the_hash_never_changes() -> None:
    """Golden numbers: a change would break every sequence resumed across versions."""
    assert hash_bits([draw_key(42, 1, 7)], 3, CPU).tolist() == [[1739143118, 3719231813, 223977051]]


def test_the_noise_is_standard_gumbel_and_always_finite() -> None:
    noise = gumbel_noise([draw_key(0, 0, step) for step in range(20)], 20_000, CPU).double()
    assert torch.isfinite(noise).all()
    # Euler's constant and pi^2 / 6, each within five standard errors.
    assert abs(noise.mean().item() - 0.577216) < 5 * math.sqrt(1.645 / noise.numel())
    assert abs(noise.var().item() - math.pi**2 / 6) < 5 * math.sqrt(4.4 * 1.645**2 / noise.numel())


# ── distribution ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    assert_follows(draws(LOGITS, 20_000, temperature=temperature), (LOGITS / temperature).softmax(-1))


def test_top_k_min_p_and_top_p_cut_the_tail_and_keep_the_ratios() -> None:
    probabilities = LOGITS.softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    first_four = torch.zeros(VOCAB).index_copy(0, order[:4], ordered[:4])
    assert_follows(draws(LOGITS, 5000, top_k=4), first_four / first_four.sum())
    likely = torch.where(probabilities >= 0.1 * ordered[0], probabilities, 0.0)
    assert_follows(draws(LOGITS, 5000, min_p=0.1), likely / likely.sum())
    count = int((ordered.cumsum(-1) < 0.7).sum()) + 1
    nucleus = torch.zeros(VOCAB).index_copy(0, order[:count], ordered[:count])
    assert_follows(draws(LOGITS, 5000, top_p=0.7), nucleus / nucleus.sum())


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the best two, 0.571 and 0.429, the first alone reaches 0.55; of all four it would not.
    assert (draws(logits, 500, top_k=2, top_p=0.55) > 0).tolist() == [True, False, False, False]
    assert (draws(logits, 500, top_p=0.55) > 0).tolist() == [True, True, False, False]


def test_top_p_looks_beyond_its_first_try_when_the_distribution_is_flat() -> None:
    logits = torch.linspace(1, 0, 3000)
    allowed = int((logits.softmax(-1).cumsum(-1) < 0.9).sum())
    drawn = draws(logits, 500, top_p=0.9).nonzero()
    assert 1024 < allowed - 100 < drawn.max() <= allowed


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"temperature": 1e-6},
        {"temperature": 1e-4},
        {"top_k": 1, "top_p": 1e-3},
    ],
)
def test_the_narrowest_filters_are_greedy(params: dict[str, float], make: Make) -> None:
    greedy = draw(make, LOGITS, spec(temperature=0.0))
    assert draw(make, LOGITS, spec(choices=tuple(range(50)), **params)) == greedy * 50


def test_greedy_takes_the_lowest_id_of_a_tie(make: Make) -> None:
    logits = torch.zeros(VOCAB)
    logits[[7, 3, 30]] = 5.0
    assert draw(make, logits, spec(temperature=0.0)) == [3]


def test_extreme_logits_stay_finite(make: Make) -> None:
    logits = torch.full((VOCAB,), -1e30)
    logits[4] = 3e38
    for temperature in (1e-4, 1.0, 100.0):
        assert draw(make, logits, spec(temperature=temperature, top_p=0.9, min_p=0.01)) == [4]
    logits = torch.full((VOCAB,), float("-inf"))
    logits[9] = -1e30
    assert draw(make, logits, spec()) == [9]


# ── what a draw depends on ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_draw_depends_on_seed_choice_and_step_alone(make: Make) -> None:
    base = spec(step=3, seed=9, choices=(2,))
    assert draw(make, LOGITS, base) == draw(make, LOGITS, base)
    changes = ({}, {"seed": 10}, {"choices": (3,)})
    specs = [replace(base, **change, step=step) for change in changes for step in range(30)]
    drawn = make(VOCAB, (EOS,)).sample(LOGITS.expand(90, -1), specs)
    assert len({drawn[:30], drawn[30:60], drawn[60:]}) == 3
    assert len(set(drawn[:30])) > 3, "each step draws anew"


def test_choices_of_one_row_are_what_each_would_draw_alone(make: Make) -> None:
    together = draw(make, LOGITS, spec(choices=tuple(range(20)), temperature=2.0))
    alone = [draw(make, LOGITS, spec(choices=(choice,), temperature=2.0))[0] for choice in range(20)]
    assert together == alone
    assert len(set(together)) > 3


def test_the_rest_of_the_batch_changes_nothing(make: Make) -> None:
    rows = torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    kinds = [
        {"temperature": 0.0},
        {},
        {"top_k": 5},
        {"top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.0, "logit_bias": ((4, 3.0),)},
        {"temperature": 0.7, "min_tokens": 5, "logprobs": 2},
    ]
    specs = [spec(step=row, seed=row, choices=(0, 1), **kinds[row % len(kinds)]) for row in range(len(rows))]
    before = rows.clone()
    together = make(VOCAB, (EOS,)).sample(rows, specs)
    assert torch.equal(rows, before), "the logits are the caller's"
    for row, one in enumerate(specs):
        (alone,) = make(VOCAB, (EOS,)).sample(rows[row : row + 1], [one])
        assert [drawn.token_id for drawn in alone] == [drawn.token_id for drawn in together[row]]


# ── edits ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_logit_bias_forces_and_forbids(make: Make) -> None:
    worst = int(LOGITS.argmin())
    best = int(LOGITS.argmax())
    assert draw(make, LOGITS, spec(temperature=0.0, logit_bias=((worst, 100.0),))) == [worst]
    assert best not in draw(make, LOGITS, spec(choices=tuple(range(50)), logit_bias=((best, -100.0),)))


def test_penalties_count_the_right_tokens(make: Make) -> None:
    logits = torch.tensor([0.0, 0.0, 3.0, 2.9, -1.0])

    def best(prompt: list[int], output: list[int], **params: float) -> int:
        one = replace(spec(temperature=0.0, **params), prompt_ids=prompt, output_ids=output)
        return draw(make, logits, one)[0]

    assert best([2], [], repetition_penalty=1.2) == 3, "repetition counts the prompt: 3.0 / 1.2 < 2.9"
    assert best([2], [], presence_penalty=1.0) == 2, "presence does not"
    assert best([], [2], presence_penalty=1.0) == 3
    assert best([], [2, 3, 3], presence_penalty=1.0) == 2, "presence counts once"
    assert best([], [2, 2, 3], frequency_penalty=0.5) == 3, "frequency counts each time"
    assert best([], [2, 3], repetition_penalty=0.5) == 2, "below 1 it encourages"
    all_negative = replace(spec(temperature=0.0, repetition_penalty=2.0), prompt_ids=[1])
    assert draw(make, torch.tensor([-1.5, -1.0]), all_negative) == [0], "a negative logit moves down, too"


def test_bias_comes_before_penalties(make: Make) -> None:
    one = replace(spec(temperature=0.0, logit_bias=((2, 1.0),), repetition_penalty=2.0), prompt_ids=[2])
    assert draw(make, torch.tensor([2.1, 0.0, 3.0]), one) == [0], "(3 + 1) / 2 < 2.1, though 3 / 2 + 1 is not"


def test_min_tokens_holds_back_every_token_that_would_end_it(make: Make) -> None:
    logits = torch.zeros(VOCAB)
    logits[EOS], logits[6], logits[9] = 9.0, 8.0, 7.0
    held = {"temperature": 0.0, "min_tokens": 3, "max_tokens": 9, "stop_token_ids": (6,)}
    assert [draw(make, logits, spec(step=step, **held))[0] for step in range(5)] == [9, 9, 9, EOS, EOS]
    assert draw(make, logits, spec(ignore_eos=True, **held)) == [EOS], "an end token that ends nothing may come"


def test_logprobs_are_of_the_unmodified_distribution(make: Make) -> None:
    truth = LOGITS.double().log_softmax(-1)
    one = spec(temperature=0.5, top_k=1, logit_bias=((3, 50.0),), logprobs=4)
    ((drawn,),) = make(VOCAB, (EOS,)).sample(LOGITS[None], [one])
    assert drawn.token_id == 3
    assert drawn.logprob == pytest.approx(truth[3].item(), rel=1e-5)
    values, ids = truth.topk(4)
    assert [token_id for token_id, _ in drawn.top] == ids.tolist()
    assert [value for _, value in drawn.top] == pytest.approx(values.tolist(), rel=1e-5)
    ((alone,),) = make(VOCAB, (EOS,)).sample(LOGITS[None], [spec(temperature=0.0, logprobs=0)])
    assert alone.top == ()
    assert alone.logprob == pytest.approx(truth.max().item(), rel=1e-5)
    assert make(VOCAB, (EOS,)).sample(LOGITS[None], [spec(temperature=0.0)]) == ((Sampled(int(LOGITS.argmax())),),)


def test_a_structure_decides_what_may_be_drawn(make: Make) -> None:
    """Beside rows that have none, and before any filter: what it leaves is what is drawn from."""
    free = spec(temperature=1.0, choices=tuple(range(50)))
    held = [
        replace(spec(step=count, choices=tuple(range(50)), structure=STRUCTURE, **params), output_ids=[5] * count)
        for count, params in enumerate([{}, {"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.4}, {"min_p": 0.1}])
    ]
    sampler = make(VOCAB, (EOS,))
    rows = sampler.sample(LOGITS.expand(6, -1), [free, *held])
    assert [one.token_id for one in rows[0]] == draw(make, LOGITS, free)
    for count, row in enumerate(rows[1:]):
        assert {(one.token_id + count) % 3 for one in row} == {0}
    allowed = [token_id for token_id in range(VOCAB) if (token_id + 1) % 3 == 0]
    assert rows[2][0].token_id == max(allowed, key=lambda token_id: LOGITS[token_id])
    fourth = sorted(((LOGITS[i].item(), i) for i in range(VOCAB) if (i + 2) % 3 == 0), reverse=True)[:4]
    assert {one.token_id for one in rows[3]} <= {token_id for _, token_id in fourth}
    # Of the model, as ever.
    ((one,),) = sampler.sample(LOGITS[None], [spec(temperature=0.0, structure=STRUCTURE, logprobs=0)])
    assert one.logprob == pytest.approx(LOGITS.double().log_softmax(-1)[one.token_id].item(), rel=1e-5)


def test_a_row_that_loses_its_structure_draws_no_token(make: Make) -> None:
    """All others of the batch draw theirs, and keep their numbers."""
    specs = [
        spec(temperature=0.0),
        spec(choices=(0, 1, 2), structure=LOST, logprobs=1),
        spec(temperature=0.0, structure=STRUCTURE),
        spec(temperature=0.0, logprobs=0),
    ]
    first, lost, held, last = make(VOCAB, (EOS,)).sample(LOGITS.expand(4, -1), specs)
    assert lost == (Sampled(NO_TOKEN),) * 3
    assert [one.token_id for one in (*first, *last)] == [int(LOGITS.argmax())] * 2
    assert held[0].token_id % 3 == 0
    for one, drawn in zip(specs, (first, lost, held, last), strict=True):
        assert (one.problem(drawn) is None) == (drawn != lost)


def test_no_rows_is_no_work(make: Make) -> None:
    assert make(VOCAB, (EOS,)).sample(torch.empty(0, VOCAB), []) == ()
