"""Operator times by hand: rooflines, interpolation in logarithms, what holds outside a grid, waves of tiles."""

from __future__ import annotations

import math

import pytest

from cluster.planning.operators import (
    MEMO_SIZE,
    Collective,
    Curve,
    DecodeAttention,
    Gemm,
    Grid,
    PrefillAttention,
    Roofline,
    wave_excess,
)

PEAK = Roofline(flops_s=1e12, bytes_s=1e9, latency_s=1e-6)


def test_a_roofline_is_the_larger_of_two_and_a_latency() -> None:
    assert PEAK.seconds(2e12, 1e9) == pytest.approx(2 + 1e-6)
    assert PEAK.seconds(1e12, 3e9) == pytest.approx(3 + 1e-6)
    assert PEAK.seconds(0, 0) == 1e-6


def test_bytes_that_a_cache_holds_move_faster() -> None:
    cached = Roofline(1e12, 1e9, 0.0, cache_bytes=1e6, cached_bytes_s=4e9)
    assert cached.seconds(0, 1e6) == pytest.approx(1e6 / 4e9)
    assert cached.seconds(0, 1e6 + 1) == pytest.approx((1e6 + 1) / 1e9)


def test_a_grid_is_straight_between_logarithms_and_held_outside() -> None:
    grid = Grid(((1.0, 4.0), (10.0, 1000.0)), (0.0, 1.0, 2.0, 3.0))
    assert grid.log_correction(1, 10) == 0.0
    assert grid.log_correction(2, 10) == pytest.approx(1.0)
    assert grid.log_correction(2, 100) == pytest.approx(1.5)
    assert grid.log_correction(4, 1000) == 3.0
    assert grid.log_correction(99, 99999) == 3.0
    assert grid.log_correction(0.5, 1) == 0.0


def test_a_measured_grid_gives_back_what_was_measured() -> None:
    def measured_s(m: float, n: float, k: float) -> float:
        return 1e-6 * (m + n) * math.sqrt(k)

    plain = Gemm(PEAK)
    gemm = Gemm(PEAK, Grid.measured(((1, 8, 64), (16, 32), (8, 16, 128)), measured_s, plain.roofline_s))
    for m, n, k in ((1, 16, 8), (8, 32, 16), (64, 16, 128)):
        assert gemm.seconds(m, n, k) == pytest.approx(measured_s(m, n, k))
    # Beyond the grid the last correction holds, so times grow as the roofline does.
    beyond = gemm.seconds(640, 16, 128) / gemm.seconds(64, 16, 128)
    assert beyond == pytest.approx(plain.roofline_s(640, 16, 128) / plain.roofline_s(64, 16, 128))


@pytest.mark.parametrize(
    ("axes", "values"), [(((1.0, 2.0),), (0.0,)), (((2.0, 1.0),), (0.0, 0.0)), (((0.0, 1.0),), (0.0, 0.0))]
)
def test_a_crooked_grid_is_a_bug(axes: tuple[tuple[float, ...], ...], values: tuple[float, ...]) -> None:
    with pytest.raises(AssertionError):
        Grid(axes, values)


def test_gemm_limits() -> None:
    gemm = Gemm(PEAK, element_bytes=2)
    assert gemm.seconds(1, 4096, 4096) == pytest.approx(2 * (4096**2 + 2 * 4096) / 1e9 + 1e-6)
    fast_memory = Gemm(Roofline(1e12, 1e15))
    assert fast_memory.seconds(8192, 4096, 4096) == pytest.approx(2 * 8192 * 4096**2 / 1e12)


def test_the_memo_changes_nothing_and_is_bounded() -> None:
    gemm = Gemm(PEAK)
    first = gemm.seconds(3, 5, 7)
    assert gemm.seconds(3, 5, 7) == first
    gemm.memo.update({(m, 1, 1): 0.0 for m in range(MEMO_SIZE)})
    gemm.seconds(4, 5, 7)
    assert set(gemm.memo) == {(4, 5, 7)}


def test_waves_cost_their_full_length() -> None:
    # 10 tiles of 128 x 256 on 10 multiprocessors are one full wave; an eleventh starts a second.
    full, over = wave_excess(1280, 256, 10), wave_excess(1281, 256, 10)
    assert full == 1.0
    assert 1.2 < over <= 2.0
    assert wave_excess(128000, 256, 10) == 1.0
    compute = Roofline(flops_s=1e12, bytes_s=1e15)
    waved, plain = Gemm(compute, units=10, wave_power=1.0), Gemm(compute)
    assert waved.seconds(1280, 256, 4096) == plain.seconds(1280, 256, 4096)
    assert waved.seconds(1281, 256, 4096) == pytest.approx(over * plain.seconds(1281, 256, 4096))


def test_prefill_attention_by_hand() -> None:
    attention = PrefillAttention(Roofline(1e12, 1e15))
    pairs = 100 * 1000 + 100 * 101 / 2
    assert attention.seconds(100, 1000, 8, 2, 64) == pytest.approx(4 * 8 * 64 * pairs / 1e12)
    assert attention.seconds(100, 1000, 8, 2, 64, batch=3) == pytest.approx(3 * attention.seconds(100, 1000, 8, 2, 64))


def test_two_chunks_have_the_pairs_of_one_prompt() -> None:
    attention = PrefillAttention(Roofline(1e12, 1e15))
    whole = attention.seconds(512, 0, 8, 2, 64)
    assert attention.seconds(256, 0, 8, 2, 64) + attention.seconds(256, 256, 8, 2, 64) == pytest.approx(whole)


def test_a_context_is_corrected_like_a_prompt_with_as_many_pairs() -> None:
    axes = ((1.0, 1000.0), (1.0,), (1.0, 8.0), (1.0, 4.0))
    attention = PrefillAttention(Roofline(1e12, 1e15), Grid(axes, (0.0,) * 4 + (1.0,) * 4))
    plain = PrefillAttention(attention.roofline)
    # 200 tokens after 2400 attend to as many as a prompt of 1000.
    assert attention.seconds(200, 2400, 8, 2, 64) == pytest.approx(math.e * plain.seconds(200, 2400, 8, 2, 64))


def test_decode_attention_reads_each_kv_head_once() -> None:
    attention = DecodeAttention(Roofline(1e15, 1e9))
    kv_bytes = 2 * 2 * 4 * 128 * 1000 * 2
    q_and_o_bytes = 2 * 4 * 128 * 2 * 8
    assert attention.seconds(1000, 8, 2, 128, 4) == pytest.approx((kv_bytes + q_and_o_bytes) / 1e9)


def test_more_kv_heads_than_measured_count_as_more_sequences() -> None:
    axes = ((1.0, 1000.0), (1.0, 2.0, 4.0), (1.0, 8.0), (1.0, 4.0))
    values = tuple(0.1 * number for number in range(24))
    attention = DecodeAttention(Roofline(1e15, 1e9), Grid(axes, values))
    assert attention.seconds(1000, 16, 16, 128, 2) == pytest.approx(attention.seconds(1000, 8, 8, 128, 4))


def test_a_curve_holds_below_and_grows_with_the_bytes_above() -> None:
    curve = Curve((1000.0, 4000.0), (1.0, 2.0))
    assert curve.at(10) == 1.0
    assert curve.at(2000) == pytest.approx(math.sqrt(2.0))
    assert curve.at(8000) == pytest.approx(4.0)


def test_collectives() -> None:
    ring = Collective(Roofline(1.0, 1e9, 1e-6))
    assert ring.seconds(1e9, 1) == 0.0
    assert ring.seconds(1e9, 4) == pytest.approx(1.5 + 6e-6)
    measured = Collective(ring.link, ((2, Curve((1.0,), (1.0,))), (8, Curve((1.0,), (4.0,)))))
    assert measured.seconds(1, 4) == pytest.approx(2.0)
    assert measured.seconds(1, 16) == 4.0
    assert measured.seconds(0, 8) == 0.0
