"""The sampling kernels: the documented bits, edits and cuts that a sort would find, and no trace of how rows are split.

That draws have the right distribution and equal engine/sampler.py's is checked in tests/engine/test_device_sampler.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from engine.random_draw import W_MAX, draw_key
from engine.random_draw import hash_bits as reference_hash_bits
from kernels.gpu.counter_noise import gumbel_noise, hash_bits, log_of_sum
from kernels.gpu.sample import sample
from kernels.gpu.sample_cuts import INFINITY_DEPTH, find_cuts
from kernels.gpu.sample_edits import edit_logits
from kernels.gpu.sample_inputs import SampleInputs, SampleShape, empty_inputs
from kernels.gpu.sample_split import CHUNK_MIN, Split, candidates
from tests.kernels.gpu.quick_interpreter import quick_interpreter

NEVER = float("-inf")


@pytest.fixture(autouse=True)
def _quick(device: torch.device) -> Iterator[None]:
    with quick_interpreter() if device.type == "cpu" else nullcontext():
        yield


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def key_of(seed: int, choice: int = 0, step: int = 0) -> int:
    """As the int64 that has the key's bits."""
    return int(np.uint64(draw_key(seed, choice, step)).view(np.int64))


def draw_inputs(rows: int, **values: list[float]) -> SampleInputs:
    """One draw per row, no edits; each of `values` fills a section of that name."""
    top_k, top_p = values.get("top_k", [0]), values.get("top_p", [1])
    shape = SampleShape(rows, rows, any_noise=True, any_top_k=any(top_k), any_top_p=min(top_p) < 1)
    inputs = empty_inputs(shape)
    inputs.keys[:] = torch.tensor([key_of(row) for row in range(rows)])
    inputs.draw_rows[:] = torch.arange(rows)
    defaults = {"temperatures": [1.0], "top_k": [0], "top_p": [1.0], "min_p_cuts": [INFINITY_DEPTH]}
    for name, value in {**defaults, **values}.items():
        getattr(inputs, name)[:] = torch.tensor(value)
    return inputs


# ── the noise ────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _write_hashes(key, out, TILE: tl.constexpr):
    token_ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + token_ids, hash_bits(tl.load(key), token_ids).to(tl.int64))


@triton.jit
def _write_noise(key, out, TILE: tl.constexpr):
    token_ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + token_ids, gumbel_noise(tl.load(key), token_ids))


@triton.jit
def _write_log1p(w, out, TILE: tl.constexpr):
    """log1p(-w), as in gumbel_noise."""
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(w + places)
    u = 1.0 - x
    lost = (1.0 - u) - x
    tl.store(out + places, log_of_sum(u, lost + lost * x))


@pytest.mark.parametrize(("seed", "choice", "step"), [(0, 0, 0), (-1, 3, 1000), ((1 << 63) - 1, 63, 1 << 30)])
def test_the_hash_is_the_documented_one_bit_for_bit(seed: int, choice: int, step: int, device: torch.device) -> None:
    key = torch.tensor([key_of(seed, choice, step)], device=device)
    got = torch.empty(8192, dtype=torch.int64, device=device)
    _write_hashes[(8,)](key, got, TILE=1024)
    expected = reference_hash_bits([draw_key(seed, choice, step)], 8192, torch.device("cpu"))[0]
    assert torch.equal(got.cpu(), expected)


def test_the_noise_is_as_near_to_the_truth_as_torch_comes(device: torch.device) -> None:
    count = 1 << 18
    got = torch.empty(count, device=device)
    _write_noise[(16,)](torch.tensor([key_of(7)], device=device), got, TILE=count // 16, enable_fp_fusion=False)
    bits = reference_hash_bits([draw_key(7, 0, 0)], count, torch.device("cpu"))[0]
    w = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_max(W_MAX)
    truth = -torch.log(-torch.log1p(-w.double()))
    torchs = -torch.log(-torch.log1p(-w))
    assert (got.cpu().double() - truth).abs().max() <= 1.01 * (torchs.double() - truth).abs().max()


def test_log1p_keeps_its_precision_at_every_scale(device: torch.device) -> None:
    """The error of a unit in the last place at most twice torch's, from 2^-33 to the largest w."""
    count = 1 << 16
    exponents = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.exp2(-33 * exponents).float().clamp_max(W_MAX)
    w[:3] = torch.tensor([2.0**-33, 0.5, W_MAX])
    got = torch.empty(count, device=device)
    _write_log1p[(4,)](w.to(device), got, TILE=count // 4, enable_fp_fusion=False)
    truth = torch.log1p(-w.double())

    def error(values: torch.Tensor) -> float:
        return ((values.double() - truth) / truth).abs().max().item()

    assert error(got.cpu()) <= 2 * error(torch.log1p(-w))
    assert error(got.cpu()) < 2**-23


# ── edits ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def edit_inputs(shape: SampleShape, **values: list[float]) -> SampleInputs:
    inputs = empty_inputs(shape)
    for name, value in values.items():
        section = getattr(inputs, name)
        section[: len(value)] = torch.tensor(value, dtype=section.dtype)
    return inputs


def test_biases_of_one_token_are_added_one_by_one(device: torch.device) -> None:
    logits = randn(3, 50)
    # 1e8 swallows the small ones if it comes first, and not if their sum does.
    biases = [1e8, 1.0, -1e8, 2.0, NEVER, 5.0, 7.0]
    inputs = edit_inputs(
        SampleShape(3, 0, biased=8, biases=8, biases_each=3),
        biased_rows=[2, 0, 2, 2, -1, -1, -1, -1],
        biased_ids=[49, 0, 7, 8],
        bias_ends=[3, 4, 5, 7],
        biases=biases,
    )
    got = edit_logits(logits.to(device), inputs.on(device)).cpu()
    expected = logits.clone()
    expected[2, 49] = ((expected[2, 49] + 1e8) + 1.0) - 1e8
    expected[0, 0] += 2
    expected[2, 7] = NEVER
    expected[2, 8] = (expected[2, 8] + 5) + 7
    assert torch.equal(got, expected)


def test_many_biases_take_several_programs(device: torch.device) -> None:
    vocab, count = 2000, 700
    logits, biases = randn(1, vocab), randn(count, seed=1)
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(2))[:count]
    shape = SampleShape(1, 0, biased=1024, biases=1024, biases_each=1)
    inputs = edit_inputs(shape, biased_rows=[0] * count + [-1] * 324, biased_ids=ids.tolist(), biases=biases.tolist())
    inputs.bias_ends[:] = torch.arange(1, 1025)
    got = edit_logits(logits.to(device), inputs.on(device)).cpu()
    assert torch.equal(got[0], logits[0].index_add(0, ids, biases))


def test_penalties_count_each_token_of_long_histories(device: torch.device) -> None:
    """Histories of several programs, full of repetitions, one empty; rows in between have none."""
    vocab = 90
    logits = randn(5, vocab) * 3
    generator = torch.Generator().manual_seed(3)
    prompts, outputs = (4, 300, 0, 700), (600, 0, 0, 5)
    rows, repetition, presence, frequency = [0, 1, 3, 4], [1.3, 0.7, 2.0, 1.0], [0.1, 0, 1, -1.7], [0.3, 1.0, 0, 0.1]
    ids, starts, split, ends = [], [], [], []
    expected = logits.clone()
    for line, row in enumerate(rows):
        prompt = torch.randint(vocab // 2, (prompts[line],), generator=generator)
        output = torch.randint(vocab, (outputs[line],), generator=generator)
        starts.append(len(ids))
        split.append(len(ids) + len(prompt))
        ids += [*prompt.tolist(), *output.tolist()]
        ends.append(len(ids))
        seen = torch.cat((prompt, output)).unique()
        scores = expected[row, seen]
        expected[row, seen] = torch.where(scores > 0, scores / repetition[line], scores * repetition[line])
        counts = torch.bincount(output, minlength=vocab)
        less = presence[line] + frequency[line] * counts
        expected[row] = torch.where(counts > 0, expected[row] - less, expected[row])
    shape = SampleShape(5, 0, histories=4, history_ids=2048, history_each=1024)
    inputs = edit_inputs(
        shape,
        history_rows=rows,
        history_starts=starts,
        history_outputs=split,
        history_ends=ends,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        history_ids=ids,
    )
    before = logits.to(device)
    assert torch.equal(edit_logits(before, inputs.on(device)).cpu(), expected)
    assert torch.equal(before.cpu(), logits), "the logits are the caller's"


def test_no_edits_are_no_copy(device: torch.device) -> None:
    logits = randn(2, 7).to(device)
    assert edit_logits(logits, empty_inputs(SampleShape(2, 0)).on(device)) is logits


# ── cuts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def kept(logits: torch.Tensor, split: Split, device: torch.device, **values: list[float]) -> torch.Tensor:
    """Which tokens the kernels keep, [rows, vocab]."""
    rows, vocab = logits.shape
    padded = torch.full((rows, split.chunk(vocab) * split.count), NEVER)
    padded[:, :vocab] = logits
    maxima = padded.view(rows, split.count, -1).amax(-1)
    cuts = find_cuts(logits.to(device), draw_inputs(rows, **values).on(device), maxima.to(device), split).cpu()
    temperatures = torch.tensor(values.get("temperatures", [1.0]), dtype=torch.float32)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]
    return scaled.view(torch.int32).bitwise_and(0x7FFFFFFF) <= cuts[:, None]


def kinds_of_logits(vocab: int) -> torch.Tensor:
    """Rows of any shape that logits may have, [7, vocab]."""
    half_forbidden = randn(vocab, seed=1)
    half_forbidden[: vocab // 2] = NEVER
    return torch.stack(
        (
            randn(vocab) * 3,
            randn(vocab, seed=2).mul(2).round(),  # ties
            torch.zeros(vocab),
            half_forbidden,
            torch.linspace(1, 0, vocab),
            randn(vocab, seed=3) * 1e-4,
            randn(vocab, seed=4) * 300,
        )
    )


@pytest.mark.parametrize(
    ("vocab", "k", "split"),
    [(1, 1, Split(1)), (40, 7, Split(1)), (300, 1, Split(1)), (1025, 1000, Split(1)), (2100, 50, Split(8))],
)
def test_top_k_keeps_the_k_best_and_ties_of_the_last(vocab: int, k: int, split: Split, device: torch.device) -> None:
    logits = kinds_of_logits(vocab)
    least = logits.topk(k).values[:, -1:]
    assert torch.equal(kept(logits, split, device, top_k=[k] * len(logits)), logits >= least)


@pytest.mark.parametrize(
    ("vocab", "p", "split"),
    [(1, 0.5, Split(1)), (40, 0.9, Split(1)), (300, 1e-9, Split(1)), (1025, 0.5, Split(1)), (2100, 0.999, Split(8))],
)
def test_top_p_keeps_as_few_as_weigh_it_and_ties_of_the_last(
    vocab: int, p: float, split: Split, device: torch.device
) -> None:
    logits = kinds_of_logits(vocab)
    got = kept(logits, split, device, top_p=[p] * len(logits))
    weights = logits.double().softmax(-1)
    last = torch.where(got, logits, math.inf).amin(-1, keepdim=True)
    assert torch.equal(got, logits >= last), "whoever is likelier is kept, and so are ties"
    target = np.float32(p).item()
    # Weights are exact to some 1e-7 of the whole.
    assert (weights.where(logits > last, 0).sum(-1) < target + 1e-7).all(), "fewer would not have done"
    assert (weights.where(got, 0).sum(-1) > target - 1e-7).all()


def test_each_row_has_its_own_filters_one_after_the_other(device: torch.device) -> None:
    logits = randn(6, 300)
    temperatures = [1.0, 0.5, 2.0, 1.0, 1.0, 1.0]
    cuts = [INFINITY_DEPTH] * 4 + [int(np.float32(1.0).view(np.int32))] * 2
    top_k, top_p = [0, 20, 0, 20, 20, 0], [1.0, 1.0, 0.6, 0.6, 1.0, 0.6]
    got = kept(logits, Split(1), device, temperatures=temperatures, top_k=top_k, top_p=top_p, min_p_cuts=cuts)
    for row in range(6):
        scaled = ((logits[row] - logits[row].max()) / temperatures[row]).double()
        if row >= 4:
            scaled[scaled < -1] = NEVER
        if top_k[row]:
            scaled[scaled < scaled.topk(top_k[row]).values[-1]] = NEVER
        ordered, order = scaled.softmax(-1).sort(descending=True)
        if top_p[row] < 1:
            scaled[order[(ordered.cumsum(-1) - ordered) >= top_p[row]]] = NEVER
        assert torch.equal(got[row], scaled > NEVER), row
    assert got[3].sum() < got[1].sum(), "the filters of row 3 together cut more than top_k"


def test_wider_filters_keep_what_narrower_ones_do(device: torch.device) -> None:
    logits = randn(1, 500).expand(12, -1).contiguous()
    by_k = kept(logits, Split(1), device, top_k=[1, 2, 3, 5, 8, 13, 50, 100, 200, 300, 400, 499])
    by_p = kept(logits, Split(1), device, top_p=[1e-9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 0.9999])
    for got in (by_k, by_p):
        assert (got[:-1] <= got[1:]).all()
        assert got[0].sum() == 1
        assert len(got.sum(-1).unique()) > 8


# ── draws ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_how_a_row_is_split_changes_nothing(device: torch.device) -> None:
    vocab = 3 * CHUNK_MIN + 123
    logits = torch.stack((randn(vocab) * 3, randn(vocab, seed=1).round(), torch.zeros(vocab)))
    inputs = draw_inputs(3, temperatures=[0.7, 1.0, 0.0], top_k=[0, 1000, 0], top_p=[0.95, 0.9, 1.0]).on(device)
    first, second = (sample(logits.to(device), inputs, split).tolist() for split in (Split(1), Split(8)))
    assert first == second
    assert first[2] == 0


def test_noise_decides_among_the_kept_alone(device: torch.device) -> None:
    """Whoever is drawn from many is drawn from any fewer that hold it."""
    rows = 16
    logits = randn(1, 200).expand(rows, -1).contiguous()
    tokens = {k: sample(logits.to(device), draw_inputs(rows, top_k=[k] * rows).on(device)).cpu() for k in (0, 20, 3)}
    rank = logits[0].argsort(descending=True).argsort()
    for wide, narrow in ((0, 20), (20, 3)):
        held = rank[tokens[wide]] < narrow
        assert 0 < held.sum() < rows
        assert torch.equal(tokens[wide][held], tokens[narrow][held])
        assert (rank[tokens[narrow]] < narrow).all()


def test_greedy_takes_the_lowest_id_of_a_tie_across_programs(device: torch.device) -> None:
    logits = torch.zeros(2, 4 * CHUNK_MIN)
    logits[0, [3000, 2100, 4000]] = 5.0
    logits[1] = NEVER
    inputs = draw_inputs(2, temperatures=[0.0, 0.0]).on(device)
    assert sample(logits.to(device), inputs, Split(8)).tolist() == [2100, 0]


def test_no_integer_overflows(device: torch.device) -> None:
    """Where Triton interprets, an overflow is an error here; hashes wrap around, but in 64 bits."""
    logits = torch.cat((randn(2, 80), randn(1, 80, seed=1) * 1e-30, torch.tensor([[-3e38, 3e38] * 40])))
    inputs = draw_inputs(4, top_k=[0, 5, 5, 60], top_p=[0.9, 1.0, 0.9, 0.9]).on(device)
    with quick_interpreter(finds_overflows=True) if device.type == "cpu" else nullcontext():
        drawn = sample(logits.to(device), inputs, Split(1)).tolist()
    assert all(0 <= token_id < 80 for token_id in drawn)
    assert drawn[3] % 2 == 1, "the larger half weighs all"


@pytest.mark.parametrize("broken", [math.nan, math.inf, NEVER])
def test_broken_logits_still_give_a_token(broken: float, device: torch.device) -> None:
    logits = randn(3, 60)
    logits[:, 5] = broken
    logits[2] = broken
    greedy = draw_inputs(3, temperatures=[0.0] * 3)
    filtered = draw_inputs(3, top_k=[0, 4, 4], top_p=[1.0, 0.9, 0.9])
    for inputs in (greedy, filtered):
        # inf - inf is no news here.
        with np.errstate(invalid="ignore"):
            drawn = sample(logits.to(device), inputs.on(device)).tolist()
        assert all(0 <= token_id < 60 for token_id in drawn)


@pytest.mark.parametrize(
    ("vocab", "tied"), [(1 << 14, False), pytest.param(1 << 18, True, marks=pytest.mark.nightly, id="largest")]
)
def test_large_vocabularies(vocab: int, tied: bool, device: torch.device) -> None:
    logits = torch.zeros(1, vocab) if tied else torch.linspace(0, 10, vocab)[None].contiguous()
    logits[0, vocab - 1] = 20.0
    # With ties for second place top_k leaves all. The largest has more than 0.99 of the weight either way.
    inputs = draw_inputs(1, top_k=[1000], top_p=[0.9]).on(device)
    assert sample(logits.to(device), inputs, Split(8)).tolist() == [vocab - 1]


@pytest.mark.parametrize(("rows", "vocab"), [(1, 100), (1, 50_000), (1, 128_256), (64, 128_256), (4096, 262_144)])
def test_every_split_covers_the_vocabulary(rows: int, vocab: int) -> None:
    for config in candidates(rows, vocab):
        split = Split(config.sizes["SPLITS"])
        assert split.chunk(vocab) % CHUNK_MIN == 0
        assert split.chunk(vocab) * split.count >= vocab


def test_few_rows_are_split_most() -> None:
    first = [candidates(rows, 128_256)[0].sizes["SPLITS"] for rows in (1, 8, 16, 64, 128, 1024)]
    assert first == [128, 128, 32, 8, 8, 1]
    assert candidates(1, 300)[0].sizes["SPLITS"] == 1
