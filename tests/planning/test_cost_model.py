"""The cost model on a device whose operators can be worked out by hand, and on the packaged ones."""

from __future__ import annotations

import json
import math
import timeit
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.planning.capacity import check_split, kv_capacity_tokens, rank_share
from cluster.planning.cost_model import CostModel, cost_model, nearest_profile, predictor_for_worker
from cluster.planning.device_profile import device_profile, known_profiles
from cluster.planning.model_shape import ModelShape, model_shape
from cluster.planning.operator_law import FIXED_GPU_S, HAND_OVER_S, OperatorLaw, equal_prompts
from cluster.planning.step_law import Interpolated, WorkerFacts
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.step_cost import StepCost, StepWork

FLOPS_S, BYTES_S, LATENCY_S, LINK_S = 1e12, 1e11, 1e-6, 1e10
SHAPE = ModelShape("small", 3, 64, 4, 2, 16, 128, 1000, 4096)


class FlatDevice:
    """Every operator is its roofline: max(operations / 1 TFLOP/s, bytes / 100 GB/s) + 1 µs; links have no latency."""

    name, element_bytes, nvlink_bytes_s, network_bytes_s = "flat", 2, LINK_S, LINK_S / 10

    def gemm_s(self, m: int, n: int, k: int) -> float:
        return gemm_s(m, n, k)

    def prefill_attention_s(
        self, new_tokens: int, context: int, num_heads: int, num_kv_heads: int, head_dim: int, batch: int
    ) -> float:
        pairs = new_tokens * (context + (new_tokens + 1) / 2)
        rows = 2 * new_tokens * num_heads + 2 * (context + new_tokens) * num_kv_heads
        return batch * max(4 * num_heads * head_dim * pairs / FLOPS_S, 2 * rows * head_dim / BYTES_S) + LATENCY_S

    def decode_attention_s(
        self, rows: int, context_tokens_sum: float, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> float:
        elements = head_dim * (2 * context_tokens_sum * num_kv_heads + 2 * rows * num_heads)
        return max(4 * num_heads * head_dim * context_tokens_sum / FLOPS_S, 2 * elements / BYTES_S) + LATENCY_S

    def all_reduce_s(self, size_bytes: float, ranks: int) -> float:
        return size_bytes * 2 * (ranks - 1) / ranks / LINK_S

    def memory_copy_s(self, size_bytes: float) -> float:
        return moved_s(2 * size_bytes)


def gemm_s(m: int, n: int, k: int) -> float:
    return max(2 * m * n * k / FLOPS_S, 2 * (m * k + k * n + m * n) / BYTES_S) + LATENCY_S


def moved_s(moved_bytes: float) -> float:
    return moved_bytes / BYTES_S + LATENCY_S


def tokens_by_hand_s(m: int) -> float:
    """All of a step but attention and the head."""
    gemms = gemm_s(m, 64 + 2 * 32, 64) + gemm_s(m, 64, 64) + gemm_s(m, 2 * 128, 64) + gemm_s(m, 64, 128)
    vectors = sum(moved_s(2 * m * n) for n in (4 * 64, 4 * 64, 2 * (64 + 32), 3 * 128, 4 * 32))
    return FIXED_GPU_S + 3 * (gemms + vectors) + moved_s(2 * 2 * m * 64)


def head_by_hand_s(rows: int) -> float:
    return gemm_s(rows, 1000, 64) + moved_s(3 * rows * 1000 * 4)


def test_a_decode_step_is_the_sum_of_its_operators() -> None:
    attention = max(4 * 8 * 4 * 16 * 100 / FLOPS_S, 2 * 8 * 16 * (2 * 100 * 2 + 2 * 4) / BYTES_S) + LATENCY_S
    by_hand = tokens_by_hand_s(8) + head_by_hand_s(8) + 3 * attention
    # 800 tokens of context are no edge of a cell of the interpolation, and this attention is a straight line.
    assert OperatorLaw(FlatDevice(), SHAPE).decode_s(8, 800) == pytest.approx(by_hand, rel=1e-9)


def test_a_mixed_step_is_the_sum_of_its_operators() -> None:
    decode = max(4 * 8 * 4 * 16 * 100 / FLOPS_S, 2 * 8 * 16 * (2 * 100 * 2 + 2 * 4) / BYTES_S) + LATENCY_S
    pairs = 16 * (50 + 17 / 2)
    prefill = max(4 * 4 * 16 * pairs / FLOPS_S, 2 * 16 * (2 * 16 * 4 + 2 * 66 * 2) / BYTES_S) + LATENCY_S
    by_hand = tokens_by_hand_s(24) + head_by_hand_s(9) + 3 * (decode + prefill)
    seconds = OperatorLaw(FlatDevice(), SHAPE).prompt_s(StepWork(((16, 50),), 8, 800))
    assert seconds == pytest.approx(by_hand, rel=1e-9)


def test_two_ranks_halve_the_work_and_add_all_reduces() -> None:
    shape = replace(SHAPE, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=16384)
    work = StepWork(((2048, 0),))
    alone, both = (OperatorLaw(FlatDevice(), shape, tp).prompt_s(work) for tp in (1, 2))
    reduces = 3 * 2 * 2048 * 4096 * 2 / LINK_S
    compute = alone - FIXED_GPU_S
    assert both - FIXED_GPU_S - reduces == pytest.approx(compute / 2, rel=0.05)


def test_stages_add_their_hand_overs_and_nothing_else() -> None:
    one, three = (OperatorLaw(FlatDevice(), SHAPE, 1, pp).decode_s(4, 400) for pp in (1, 3))
    assert three - one == pytest.approx(2 * (HAND_OVER_S + 4 * 64 * 2 / LINK_S))
    far = OperatorLaw(FlatDevice(), replace(SHAPE, num_layers=9), 1, 9).decode_s(4, 400)
    near = OperatorLaw(FlatDevice(), replace(SHAPE, num_layers=9), 1, 8).decode_s(4, 400)
    assert far - near == pytest.approx(HAND_OVER_S + (8 * 10 - 7) * 4 * 64 * 2 / LINK_S)


def test_prompts_of_one_step_count_as_equal_ones_with_the_same_tokens_and_pairs() -> None:
    assert equal_prompts([(100, 7)]) == (100, 7, 1)
    assert equal_prompts([(64, 10), (64, 10)]) == (64, 10, 2)
    new, context, batch = equal_prompts([(200, 0), (100, 300)])
    assert (new, batch) == (150, 2)
    pairs = 200 * 100 + 100 * 350
    assert batch * new * (context + new / 2) == pytest.approx(pairs, rel=0.01)


def test_memory_holds_what_weights_and_activations_leave() -> None:
    free = 10**9 * 0.9 - SHAPE.weight_params * 2 - (8192 * (4 * 64 + 2 * 128) * 2 + 256 * 1000 * 4)
    assert kv_capacity_tokens(SHAPE, 10**9) == int(free // (3 * 2 * 2 * 16 * 2))
    # Twice the ranks hold a little more than twice as much: the weights are there once.
    assert kv_capacity_tokens(SHAPE, 10**9, tp=2) > 1.99 * kv_capacity_tokens(SHAPE, 10**9)
    # Three stages of one layer each.
    assert kv_capacity_tokens(SHAPE, 10**9, pp=3) > 2.99 * kv_capacity_tokens(SHAPE, 10**9)
    # KV heads are held twice where there are fewer of them than ranks.
    assert rank_share(SHAPE, 4, 1).num_kv_heads == 1
    assert kv_capacity_tokens(SHAPE, 10**6) == 0


@pytest.mark.parametrize(("tp", "pp", "named"), [(3, 1, "tp: got 3"), (0, 1, "tp: got 0"), (1, 4, "pp: got 4")])
def test_a_split_that_does_not_divide_is_refused(tp: int, pp: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_split(SHAPE, tp, pp)


def test_saturation_is_the_smallest_chunk_near_the_best_rate() -> None:
    class Law:
        """10 ms and 1 ms a token: 95 % of the best rate up to 8,192 tokens needs 180.3 tokens."""

        def decode_s(self, rows: int, context_tokens: int) -> float:
            return 0.01

        def prompt_s(self, work: StepWork) -> float:
            return 0.01 + 0.001 * work.prompt_tokens

    facts = WorkerFacts(SHAPE, 1000)
    saturation = CostModel(Law(), facts).saturation_tokens
    assert 181 <= saturation <= 181 * 2 ** (1 / 8)
    long_prompts = cost_model("h200", "llama-3.1-8b").saturation_tokens
    assert 64 <= long_prompts <= 2048


def test_whole_prompts_and_steps_agree() -> None:
    cost: StepCost = cost_model("h200", "llama-3.1-8b")
    assert isinstance(cost, CostModel)
    chunks = [StepWork(((512, start),)) for start in (100, 612)] + [StepWork(((476, 1124),))]
    assert cost.prefill_s(1500, 100, 512) == pytest.approx(sum(map(cost.step_s, chunks)))
    assert cost.prefill_s(0) == 0.0
    assert cost.decode_s(0, 0) == cost.step_s(StepWork()) == 0.0
    assert cost.decode_s(4, 4000) == cost.step_s(StepWork((), 4, 4000))
    assert cost.kv_bytes(10) == 10 * 32 * 2 * 8 * 128 * 2
    assert cost.transfer_s(10, 1e6) == pytest.approx(cost.kv_bytes(10) / 1e6)
    assert cost.gpus == 1
    assert cost_model("h200", "llama-3.1-8b", 2, 2).gpus == 4


@pytest.mark.parametrize("profile", known_profiles())
@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-8b", "smollm2-135m"])
def test_more_work_takes_longer_on_every_device(profile: str, model: str) -> None:
    cost = cost_model(profile, model, kv_capacity=100_000)
    decode = [cost.decode_s(rows, rows * 1000) for rows in (1, 16, 64, 256)]
    # Measured points have noise: a few more rows may look a little faster where the weights are all that counts.
    assert all(more > 0.98 * fewer for fewer, more in pairwise(decode))
    assert decode[-1] > decode[0]
    prefill = [cost.prefill_s(tokens) for tokens in (16, 256, 1024, 8192)]
    assert prefill == sorted(prefill)
    assert cost.prefill_s(1024, 7168) > cost.prefill_s(1024)
    mixed = cost.step_s(StepWork(((256, 0),), 16, 16_000))
    assert mixed > max(cost.decode_s(16, 16_000), cost.prefill_s(256))
    # One step for both reads the weights once.
    assert mixed < cost.decode_s(16, 16_000) + cost.prefill_s(256)


def test_llama_on_h200_is_where_such_workers_are() -> None:
    cost = cost_model("h200", "llama-3.1-8b")
    # 16 GB of weights and 64 × 2,048 × 131 kB = 17 GB of KV at 3 to 4.8 TB/s, and some hundred small kernels.
    assert 0.007 < cost.decode_s(64, 64 * 2048) < 0.015
    # 64 TFLOP at 450 to 900 TFLOP/s.
    assert 0.07 < cost.prefill_s(4000) < 0.15
    # 141 GB (GiB, by the driver) · 0.9 − 16 GB, at 131 kB a token.
    assert 780_000 < cost.kv_capacity_tokens < 930_000
    assert cost.link_bytes_s == device_profile("h200").network_bytes_s


def test_scales_correct_each_phase() -> None:
    cost = cost_model("h200", "llama-3.1-8b")
    decode, prompt, mixed = StepWork((), 8, 8000), StepWork(((512, 0),)), StepWork(((512, 0),), 8, 8000)
    scaled = cost.with_scales(2.0, 3.0)
    assert scaled.scales == (2.0, 3.0)
    assert cost.with_scales(0.0, math.nan).scales == (1.0, 1.0)
    assert scaled.step_s(decode) == pytest.approx(3 * cost.step_s(decode))
    assert scaled.step_s(prompt) == pytest.approx(2 * cost.step_s(prompt))
    added = cost.step_s(mixed) - cost.step_s(decode)
    assert scaled.step_s(mixed) == pytest.approx(3 * cost.step_s(decode) + 2 * added)
    for _ in range(100):
        cost.observe(decode, scaled.step_s(decode))
        cost.observe(prompt, scaled.step_s(prompt))
    assert cost.scales == pytest.approx((2.0, 3.0))
    assert cost.error().count == 200


def test_interpolation_is_exact_for_small_numbers_and_straight_lines() -> None:
    calls: list[int] = []

    def square(x: int) -> float:
        calls.append(x)
        return float(x * x)

    squares = Interpolated(square)
    assert [squares(x) for x in range(32)] == [x * x for x in range(32)]
    assert all(squares(x) == pytest.approx(x * x, rel=1e-3) for x in range(32, 5000, 7))
    known = len(calls)
    assert squares(4998) > squares(4997)
    assert len(calls) == known


def test_unknown_names_say_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"known devices: .*h200"):
        cost_model("h300", "llama-3.1-8b")
    with pytest.raises(ConfigError, match=r"known shapes: .*qwen3-8b"):
        cost_model("h200", "llama-9")
    with pytest.raises(ConfigError, match=r"llama-3.1-70b does not fit on 1 x 1 h200"):
        cost_model("h200", "llama-3.1-70b")
    assert cost_model("h200", "llama-3.1-70b", tp=2).kv_capacity_tokens > 100_000
    with pytest.raises(ConfigError, match="model: got ''"):
        cost_model("h200", "")
    broken = tmp_path / "broken.json"
    broken.write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        cost_model(str(broken), "llama-3.1-8b")
    broken.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ConfigError, match="tandem profile"):
        cost_model(str(broken), "llama-3.1-8b")


def test_a_worker_finds_its_profile() -> None:
    names = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100-80g"}
    names |= {"NVIDIA L4": "l4", "NVIDIA L40S": "l40s", "cpu": "cpu", "Some GPU": "a100-80g"}
    assert {name: nearest_profile(name) for name in names} == names
    assert set(names.values()) <= set(known_profiles())
    shape = model_shape("smollm2-135m")
    sizes = {field: getattr(shape, field) for field in ModelConfig.__slots__ if hasattr(shape, field)}
    config = ModelConfig(architecture="llama", rope_theta=1e4, rms_norm_eps=1e-5, tie_embeddings=True, **sizes)
    # Nine heads on two ranks: the engine splits them 5 and 4.
    cost = predictor_for_worker("", "cpu", config, tp=2, kv_capacity=5000, element_bytes=4)
    assert cost.kv_capacity_tokens == 5000
    assert cost.kv_bytes(1) == 30 * 2 * 3 * 64 * 4
    assert cost.decode_s(4, 400) > 0


@pytest.mark.nightly
def test_a_question_takes_microseconds() -> None:
    cost = cost_model("h200", "llama-3.1-8b")
    decode = [StepWork((), 64, 64 * 2048 + 17 * number) for number in range(1000)]
    mixed = [StepWork(((16 + number, 5 * number),), 1 + number % 64, 100_000 + number) for number in range(1000)]
    for works, limit_s in ((decode, 10e-6), (mixed, 100e-6)):
        for work in works:
            cost.step_s(work)
        best = min(timeit.repeat(lambda works=works: [cost.step_s(work) for work in works], number=1, repeat=5))
        assert best / len(works) < limit_s
