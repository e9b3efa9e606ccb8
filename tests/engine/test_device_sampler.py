"""The sampler that stays on the device: what is asked of every sampler, the very tokens of Sampler, and no waiting."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from engine.batch import Sampled, SampleSpec
from engine.device_sampler import DeviceSampler
from engine.sampler import Sampler
from engine.sampling import SamplingParams
from tests.engine.test_sampler import (
    EOS,
    STRUCTURE,
    VOCAB,
    EveryThird,
    Make,
    assert_follows,
    spec,
    test_a_draw_depends_on_seed_choice_and_step_alone,
    test_a_row_that_loses_its_structure_draws_no_token,
    test_a_structure_decides_what_may_be_drawn,
    test_bias_comes_before_penalties,
    test_choices_of_one_row_are_what_each_would_draw_alone,
    test_extreme_logits_stay_finite,
    test_greedy_takes_the_lowest_id_of_a_tie,
    test_logit_bias_forces_and_forbids,
    test_logprobs_are_of_the_unmodified_distribution,
    test_min_tokens_holds_back_every_token_that_would_end_it,
    test_no_rows_is_no_work,
    test_penalties_count_the_right_tokens,
    test_the_narrowest_filters_are_greedy,
    test_the_rest_of_the_batch_changes_nothing,
)
from tests.kernels.gpu.conftest import device
from tests.kernels.gpu.quick_interpreter import quick_interpreter

# Collected here as well, with this file's `make`.
__all__ = [
    "device",
    "test_a_draw_depends_on_seed_choice_and_step_alone",
    "test_a_row_that_loses_its_structure_draws_no_token",
    "test_a_structure_decides_what_may_be_drawn",
    "test_bias_comes_before_penalties",
    "test_choices_of_one_row_are_what_each_would_draw_alone",
    "test_extreme_logits_stay_finite",
    "test_greedy_takes_the_lowest_id_of_a_tie",
    "test_logit_bias_forces_and_forbids",
    "test_logprobs_are_of_the_unmodified_distribution",
    "test_min_tokens_holds_back_every_token_that_would_end_it",
    "test_no_rows_is_no_work",
    "test_penalties_count_the_right_tokens",
    "test_the_narrowest_filters_are_greedy",
    "test_the_rest_of_the_batch_changes_nothing",
]


@pytest.fixture(autouse=True)
def _quick(device: torch.device) -> Iterator[None]:
    with quick_interpreter() if device.type == "cpu" else nullcontext():
        yield


class OnDevice:
    """Takes logits from the CPU, as tests of every sampler have them."""

    def __init__(self, sampler: DeviceSampler, device: torch.device) -> None:
        self._sampler = sampler
        self._device = device

    def sample(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> tuple[tuple[Sampled, ...], ...]:
        return self._sampler.sample(logits.to(self._device), specs)


@pytest.fixture
def make(device: torch.device) -> Make:
    return lambda vocab, eos: OnDevice(DeviceSampler(vocab, eos, device, EveryThird(vocab)), device)


# ── as Sampler draws ─────────────────────────────────────────────────────────────────────────────────────────────────


def some_params(rng: random.Random, vocab: int) -> SamplingParams:
    """About half of everything is left as it is."""

    def maybe(name: str, *values: object) -> dict[str, object]:
        return {name: rng.choice(values)} if rng.random() < 0.4 else {}

    biases = tuple((rng.randrange(vocab), rng.uniform(-3, 3)) for _ in range(6))
    return SamplingParams(
        temperature=rng.choice([0.0, 1e-4, 0.3, 1.0, 1.0, 3.0]),
        **maybe("top_k", -1, 0, 1, 2, 5, vocab // 2, vocab - 1, vocab),  # type: ignore[arg-type]
        **maybe("top_p", 1e-9, 0.1, 0.5, 0.9, 0.999),  # type: ignore[arg-type]
        **maybe("min_p", 1e-5, 0.05, 0.5, 1.0),  # type: ignore[arg-type]
        **maybe("repetition_penalty", 0.7, 1.3),  # type: ignore[arg-type]
        **maybe("presence_penalty", rng.uniform(-2, 2)),  # type: ignore[arg-type]
        **maybe("frequency_penalty", rng.uniform(-2, 2)),  # type: ignore[arg-type]
        # One token named several times.
        **maybe("logit_bias", biases, (*biases, (3, 0.1), (3, 0.2), (3, 0.3))),  # type: ignore[arg-type]
        **maybe("logprobs", 0, 3, 20),  # type: ignore[arg-type]
        **maybe("min_tokens", 5),  # type: ignore[arg-type]
        **maybe("ignore_eos", True),  # type: ignore[arg-type]
        structure=rng.choice([None, None, STRUCTURE]),
        stop_token_ids=(3, 6),
    )


def some_specs(rng: random.Random, vocab: int) -> list[SampleSpec]:
    return [
        SampleSpec(
            some_params(rng, vocab),
            rng.randrange(-(1 << 63), 1 << 63),
            rng.randrange(9),
            tuple(range(rng.choice([1, 1, 3]))),
            rng.choices(range(vocab), k=rng.randrange(30)),
            rng.choices(range(vocab), k=rng.randrange(30)),
        )
        for _ in range(rng.randrange(1, 8))
    ]


def assert_equal_draws(logits: torch.Tensor, specs: Sequence[SampleSpec], device: torch.device) -> None:
    vocab = logits.shape[1]
    expected = Sampler(vocab, (EOS,), EveryThird(vocab)).sample(logits, specs)
    got = DeviceSampler(vocab, (EOS,), device, EveryThird(vocab)).sample(logits.to(device), specs)
    for one, theirs, ours in zip(specs, expected, got, strict=True):
        assert [drawn.token_id for drawn in ours] == [drawn.token_id for drawn in theirs], one
        for drawn, other in zip(ours, theirs, strict=True):
            assert drawn.logprob == pytest.approx(other.logprob, rel=1e-5, abs=1e-6)
            # Which of several equal tokens come last is nobody's promise.
            assert [value for _, value in drawn.top] == pytest.approx([value for _, value in other.top], rel=1e-5)
            assert list(drawn.top) == sorted(drawn.top, key=lambda entry: (-entry[1], entry[0]))


@pytest.mark.parametrize("batch", range(30))
def test_tokens_are_those_of_sampler(batch: int, device: torch.device) -> None:
    rng = random.Random(batch)
    specs = some_specs(rng, VOCAB)
    logits = torch.randn(len(specs), VOCAB, generator=torch.Generator().manual_seed(batch)) * rng.choice([0.1, 1, 4])
    if batch % 3 == 0:
        logits = logits.mul(2).round()  # ties
    assert_equal_draws(logits, specs, device)


@pytest.mark.nightly
@pytest.mark.parametrize("batch", range(300))
def test_tokens_are_those_of_sampler_for_larger_vocabularies(batch: int, device: torch.device) -> None:
    rng = random.Random(batch)
    vocab = rng.choice([8, 257, 1024, 5000])
    specs = some_specs(rng, vocab)
    logits = torch.randn(len(specs), vocab, generator=torch.Generator().manual_seed(batch)) * rng.choice([0.1, 1, 4])
    assert_equal_draws(logits, specs, device)


def test_frequencies_follow_the_softmax(device: torch.device) -> None:
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    sampler = DeviceSampler(8, (), device)
    specs = [spec(choices=tuple(range(200)), temperature=0.7), spec(choices=tuple(range(200)), top_k=5)]
    third = logits[1].topk(5).values[-1]
    expected = ((logits[0] / 0.7).softmax(-1), logits[1].where(logits[1] >= third, float("-inf")).softmax(-1))
    for drawn, probabilities in zip(sampler.sample(logits.to(device), specs), expected, strict=True):
        assert_follows(torch.bincount(torch.tensor([one.token_id for one in drawn]), minlength=8), probabilities)


def test_min_p_is_a_share_of_the_largest_probability(device: torch.device) -> None:
    logits = torch.arange(20)[None] * -0.03
    sampler = DeviceSampler(20, (), device)
    for temperature, last in ((1.0, 6), (2.0, 13), (0.5, 3)):
        wanted = spec(choices=tuple(range(60)), temperature=temperature, min_p=0.82)
        (drawn,) = sampler.sample(logits.to(device), [wanted])
        assert max(one.token_id for one in drawn) == last, "log(0.82) is -0.198"


# ── the three calls ──────────────────────────────────────────────────────────────────────────────────────────────────

KINDS = (
    {"temperature": 0.0, "logprobs": 2},
    {"top_k": 5, "top_p": 0.9, "logit_bias": ((4, 3.0),)},
    {"min_p": 0.01, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 0.7, "min_tokens": 9, "max_tokens": 9},
)


def one_of_each(seed: int) -> list[SampleSpec]:
    rng = random.Random(seed)
    return [
        replace(
            spec(seed=rng.randrange(100), choices=(0, 1), **kind),
            prompt_ids=rng.choices(range(VOCAB), k=20),
            output_ids=rng.choices(range(VOCAB), k=10 + rng.randrange(3)),
        )
        for kind in KINDS
    ]


def test_batches_may_be_prepared_and_launched_ahead(device: torch.device) -> None:
    sampler = DeviceSampler(VOCAB, (EOS,), device)
    batches = [one_of_each(seed) for seed in range(3)]
    logits = torch.randn(3, len(KINDS), VOCAB, generator=torch.Generator().manual_seed(1))
    prepared = [sampler.prepare(batch) for batch in batches]
    drawn = [sampler.launch(rows.to(device), one) for rows, one in zip(logits, prepared, strict=True)]
    got = [sampler.finish(one) for one in drawn]
    assert got == [sampler.sample(rows.to(device), batch) for rows, batch in zip(logits, batches, strict=True)]
    assert len({str(one) for one in got}) == 3


def test_inputs_of_equal_shape_may_be_replaced_in_place(device: torch.device) -> None:
    """As a recorded CUDA graph needs it: what is launched depends on the shape alone."""
    sampler = DeviceSampler(VOCAB, (EOS,), device)
    logits = torch.randn(len(KINDS), VOCAB, generator=torch.Generator().manual_seed(1)).to(device)
    first, second = (sampler.prepare(one_of_each(seed)) for seed in (0, 1))
    assert first.inputs.shape == second.inputs.shape
    expected = sampler.finish(sampler.launch(logits, second))
    before = sampler.finish(sampler.launch(logits, first))
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = sampler.draw(logits, first)
        first.inputs.packed.copy_(second.inputs.packed)
        graph.replay()
    else:
        first.inputs.packed.copy_(second.inputs.packed)
        drawn = sampler.draw(logits, first)
    assert sampler.finish(drawn) == expected != before


def test_launch_waits_for_nothing(device: torch.device) -> None:
    """On a GPU, which tells; anywhere, the tensors of a launch are as long as the batch says, whatever is drawn."""
    sampler = DeviceSampler(VOCAB, (EOS,), device)
    specs = one_of_each(0)
    logits = torch.randn(len(KINDS), VOCAB, generator=torch.Generator().manual_seed(1)).to(device)
    expected = sampler.sample(logits, specs)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = sampler.launch(logits, sampler.prepare(specs))
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert drawn.token_ids.shape == (8,)
    assert drawn.logprobs is not None
    assert drawn.logprobs.shape == (2,)
    assert sampler.finish(drawn) == expected


def test_an_end_token_beyond_the_vocabulary_is_left_alone(device: torch.device) -> None:
    sampler = DeviceSampler(VOCAB, (VOCAB, VOCAB + 7), device)
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 1
    held = spec(temperature=0.0, min_tokens=3, max_tokens=9)
    assert sampler.sample(logits.to(device), [held]) == ((Sampled(5),),)


def test_a_history_of_no_tokens_is_refused() -> None:
    sampler = DeviceSampler(VOCAB, ())
    for token_id in (-1, VOCAB):
        with pytest.raises(AssertionError, match="a token is no token"):
            sampler.prepare([replace(spec(presence_penalty=1.0), output_ids=[3, token_id])])
