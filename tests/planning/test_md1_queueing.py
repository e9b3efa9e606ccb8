"""The queueing formulas: DistServe's three equations, and a simulated queue beside them."""

from __future__ import annotations

import heapq
import math
import random

import pytest

from cluster.planning.queueing import PrefillQueue, pipelined, rate_bound_rps, sped_up, unsplit


def simulated_ttfts_s(
    rate_rps: float, latency_s: float, interval_s: float, replicas: int = 1, count: int = 80_000, seed: int = 1
) -> list[float]:
    """First-come first-served, the first free replica next: one queue for all of them."""
    rng = random.Random(seed)
    free_s = [0.0] * replicas
    now = 0.0
    ttfts = []
    for _ in range(count):
        now += rng.expovariate(rate_rps)
        start_s = max(now, free_s[0])
        heapq.heapreplace(free_s, start_s + interval_s)
        ttfts.append(start_s + latency_s - now)
    return ttfts


@pytest.mark.parametrize("rate_rps", [0.5, 2.0, 4.5])
def test_distserve_equations(rate_rps: float) -> None:
    """The published forms, written out: a slip in the common form would show in one of them."""
    d, r, k = 0.2, rate_rps, 1.7
    assert unsplit(d).mean_ttft_s(r) == pytest.approx(d + r * d**2 / (2 * (1 - r * d)))
    assert pipelined(d).mean_ttft_s(r) == pytest.approx(d + r * d**2 / (4 * (2 - r * d)))
    assert sped_up(d, k).mean_ttft_s(r) == pytest.approx(d / k + r * d**2 / (2 * k * (k - r * d)))


def test_ranks_win_at_low_rates_and_stages_at_high_ones() -> None:
    """DistServe's figure 4: the better split depends on the rate."""
    ranks, stages = sped_up(0.2, 1.5), pipelined(0.2)
    assert ranks.mean_ttft_s(1.0) < stages.mean_ttft_s(1.0)
    assert ranks.mean_ttft_s(7.0) > stages.mean_ttft_s(7.0)
    assert ranks.capacity_rps == pytest.approx(7.5)
    assert stages.capacity_rps == pytest.approx(10.0)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("stages", [1, 2])
def test_mean_and_quantile_against_a_simulated_queue(load: float, stages: int) -> None:
    queue = pipelined(0.1, stages)
    rate_rps = load * queue.capacity_rps
    seen = sorted(simulated_ttfts_s(rate_rps, 0.1, 0.1 / stages))
    mean_s, p90_s = sum(seen) / len(seen), seen[int(0.9 * len(seen))]
    assert queue.mean_ttft_s(rate_rps) == pytest.approx(mean_s, rel=0.04)
    bound_s = queue.ttft_quantile_s(rate_rps, 0.9)
    # A bound, and not a loose one: within an interval of the truth.
    assert p90_s <= bound_s <= p90_s + 1.5 * queue.interval_s


@pytest.mark.parametrize("replicas", [2, 4])
def test_pooling_is_a_lower_bound_and_splitting_an_upper_one(replicas: int) -> None:
    queue = unsplit(0.1, replicas)
    rate_rps = 0.8 * queue.capacity_rps
    seen = simulated_ttfts_s(rate_rps, 0.1, 0.1, replicas)
    mean_s = sum(seen) / len(seen)
    assert queue.pooled_mean_ttft_s(rate_rps) < mean_s < queue.mean_ttft_s(rate_rps)


def test_highest_rate_is_where_the_mean_reaches_the_objective() -> None:
    queue = unsplit(0.1)
    rate_rps = queue.highest_rate_rps(0.25)
    assert queue.mean_ttft_s(rate_rps) == pytest.approx(0.25, rel=1e-3)
    assert queue.mean_ttft_s(1.01 * rate_rps) > 0.25
    assert queue.highest_rate_rps(0.09) == 0.0
    # Four replicas that share a queue do better than four times one.
    assert unsplit(0.1, 4).highest_rate_rps(0.25) > 4 * rate_rps


@pytest.mark.parametrize("load", [0.6, 0.95, 1.3])
def test_admitted_share_against_a_simulated_queue_that_refuses(load: float) -> None:
    """Who would wait too long is turned away at once; above the capacity too."""
    queue, rng = unsplit(0.1), random.Random(2)
    rate_rps, patience_s = load * queue.capacity_rps, 0.25
    free_s = now = 0.0
    admitted, count = 0, 100_000
    for _ in range(count):
        now += rng.expovariate(rate_rps)
        if free_s - now <= patience_s:
            free_s = max(now, free_s) + 0.1
            admitted += 1
    assert queue.admitted_share(rate_rps, 0.35) == pytest.approx(admitted / count, abs=0.005)


def test_refusals_make_the_highest_rate_higher() -> None:
    queue = unsplit(0.1)
    rate_rps = queue.highest_admitted_rps(0.35, 0.9)
    assert queue.admitted_share(rate_rps, 0.35) == pytest.approx(0.9, abs=1e-4)
    assert queue.highest_rate_rps(0.35) > 0.6 * queue.capacity_rps
    # With any patience, 90 % of a rate cannot be more than the capacity.
    assert queue.highest_admitted_rps(100.0, 0.9) == pytest.approx(queue.capacity_rps / 0.9, rel=0.01)
    assert queue.highest_admitted_rps(0.09, 0.9) == 0.0
    assert unsplit(0.1, 4).highest_admitted_rps(0.35, 0.9) > 4 * rate_rps


def test_nothing_is_in_time_at_the_capacity() -> None:
    queue = unsplit(0.1, 2)
    assert queue.capacity_rps == pytest.approx(20.0)
    assert math.isinf(queue.mean_ttft_s(20.0))
    assert math.isinf(queue.ttft_quantile_s(25.0, 0.9))
    assert queue.ttft_quantile_s(0.0, 0.9) == 0.1


def test_unequal_prompts_wait_longer() -> None:
    """Pollaczek and Khinchine with exponential lengths: twice the waiting of equal ones."""
    equal, unequal = PrefillQueue(0.1, 0.1), PrefillQueue(0.1, 0.1, interval_cv=1.0)
    assert unequal.mean_ttft_s(5.0) - 0.1 == pytest.approx(2 * (equal.mean_ttft_s(5.0) - 0.1))


def test_rate_bound_lets_the_longest_prompts_miss() -> None:
    """Nine prompts of 0.1 s and one of 10 s: 90 % can be had without the long one, 100 % cannot at all."""
    times_s = [0.1] * 9 + [10.0]
    alone_rps = unsplit(0.1).highest_admitted_rps(1.0, 0.9)
    assert rate_bound_rps(times_s, times_s, 1, 1.0, 0.9) == pytest.approx(alone_rps, rel=0.01)
    assert rate_bound_rps(times_s, times_s, 1, 1.0, 0.95) == 0.0


@pytest.mark.parametrize("ttft_s", [0.25, 0.4, 1.0])
def test_rate_bound_is_above_what_a_simulated_queue_with_refusals_reaches(ttft_s: float) -> None:
    """First-come first-served over unequal prompts, and who would be late is refused: at the bound it misses 90 %."""
    rng = random.Random(5)
    times_s = [rng.uniform(0.02, 0.2) for _ in range(2_000)]
    bound_rps = rate_bound_rps(times_s, times_s, 1, ttft_s, 0.9)
    free_s = now = 0.0
    kept = 0
    for _ in range(40_000):
        now += rng.expovariate(bound_rps)
        end_s = max(now, free_s) + rng.choice(times_s)
        if end_s - now <= ttft_s:
            free_s = end_s
            kept += 1
    assert 0.8 < kept / 40_000 < 0.9
