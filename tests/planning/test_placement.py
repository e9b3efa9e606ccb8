"""Placement: the searches find what looking at everything finds, and stay within GPUs, nodes and links."""

from __future__ import annotations

import itertools
import random

import pytest

from cluster.planning.arrangement import Arrangement, Parallel, Pool
from cluster.planning.placement import Links, colocated, high_affinity, low_affinity, replicas

FREE = Links(1e12, 0.0)
PARALLELS = (Parallel(1), Parallel(2), Parallel(4))


def everything(
    gpus: int, prefill: dict[Parallel, float], decode: dict[Parallel, float], links: Links, units: int = 1
) -> list[tuple[float, Arrangement]]:
    """Every arrangement of two pools on `gpus` GPUs, with what it carries."""
    found = []
    for p, d in itertools.product(prefill, decode):
        for prefills, decodes in itertools.product(range(1, gpus + 1), repeat=2):
            arrangement = Arrangement(Pool(p, prefills), Pool(d, decodes), units=units)
            if arrangement.unit_gpus <= gpus:
                phases_rps = units * min(prefills * prefill[p], decodes * decode[d])
                found.append((min(phases_rps, links.capacity_rps(arrangement)), arrangement))
    return found


def drawn_rates(rng: random.Random) -> dict[Parallel, float]:
    """More ranks make a worker faster, and each of them less so."""
    one = rng.uniform(0.5, 6)
    return {parallel: one * parallel.tp ** rng.uniform(0.4, 1.1) for parallel in PARALLELS}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("goal", ["cluster", "gpu"])
def test_high_affinity_finds_the_best_there_is(seed: int, goal: str) -> None:
    rng = random.Random(seed)
    prefill, decode = drawn_rates(rng), drawn_rates(rng)
    gpus = rng.randint(2, 12)
    links = Links(rng.uniform(0.2, 20), 1.0)
    best = high_affinity(gpus, prefill, decode, links, keep=9, goal=goal)[0]  # type: ignore[arg-type]
    assert best.arrangement.gpus <= gpus
    exhaustive = everything(gpus, prefill, decode, links)
    if goal == "cluster":
        assert best.estimate_rps == pytest.approx(max(rate for rate, _ in exhaustive))
    else:
        most = max(rate / arrangement.gpus for rate, arrangement in exhaustive)
        assert best.estimate_rps / best.arrangement.gpus == pytest.approx(most)


@pytest.mark.parametrize("seed", range(8))
def test_low_affinity_finds_the_best_unit_of_a_node(seed: int) -> None:
    rng = random.Random(seed)
    prefill, decode = drawn_rates(rng), drawn_rates(rng)
    best = low_affinity(32, 8, prefill, decode, FREE, keep=1)[0]
    assert best.arrangement.units == 4
    assert best.arrangement.unit_gpus <= 8
    assert best.estimate_rps == pytest.approx(max(rate for rate, _ in everything(8, prefill, decode, FREE, units=4)))


def test_candidates_come_best_first_and_once_for_each_pair() -> None:
    rates = {Parallel(1): 1.0, Parallel(2): 1.9, Parallel(4): 3.0}
    candidates = high_affinity(8, rates, rates, FREE, keep=5)
    assert [c.estimate_rps for c in candidates] == sorted((c.estimate_rps for c in candidates), reverse=True)
    pairs = [(c.arrangement.prefill.parallel, c.arrangement.decode.parallel) for c in candidates]  # type: ignore[union-attr]
    assert len(set(pairs)) == len(pairs) == 5
    assert candidates[0].arrangement.label == "4P tp1 + 4D tp1"


def test_equal_rates_take_fewer_gpus() -> None:
    """One decode worker is enough for two prefill workers: the other five GPUs stay free."""
    candidates = high_affinity(8, {Parallel(4): 2.0}, {Parallel(1): 2.0}, FREE, keep=1)
    assert candidates[0].arrangement.label == "1P tp4 + 1D tp1"


def test_links_hold_the_rate_down() -> None:
    """10 requests a second of 1 GB over links of 2 GB/s: five sending and five receiving GPUs are needed."""
    links = Links(2e9, 1e9)
    assert links.capacity_rps(Arrangement(Pool(Parallel(1), 5), Pool(Parallel(2), 3))) == 10.0
    assert links.transfer_s(Arrangement(Pool(Parallel(1), 5), Pool(Parallel(2), 3))) == 0.5
    assert links.transfer_s(Arrangement(Pool(Parallel(4), 5), Pool(Parallel(2), 3))) == 0.25
    narrow = high_affinity(6, {Parallel(1): 10.0}, {Parallel(1): 100.0}, links, keep=1)[0]
    assert narrow.estimate_rps == 6.0
    assert narrow.arrangement.label == "3P tp1 + 3D tp1"


def test_colocated_workers_send_nothing() -> None:
    single = Arrangement(colocated=Pool(Parallel(2), 4), chunk_tokens=512)
    assert FREE.transfer_s(single) == 0.0
    assert Links(1.0, 1e9).capacity_rps(single) == float("inf")


def test_colocated_workers_stay_within_nodes() -> None:
    """Of two nodes of 6 GPUs, workers of 4 ranks get one each."""
    rates = {(Parallel(1), 512): 1.0, (Parallel(4), 512): 5.0, (Parallel(4), None): 4.0}
    candidates = colocated(12, 6, rates, keep=3)
    assert [(c.arrangement.label, c.estimate_rps) for c in candidates] == [
        ("12C tp1, chunks 512", 12.0),
        ("2C tp4, chunks 512", 10.0),
        ("2C tp4, whole prompts", 8.0),
    ]


def test_replicas_of_a_rate() -> None:
    """DistServe's n = ceil(R / goodput), and no worker more where it divides."""
    assert replicas(10.0, 3.0, 5.0) == (4, 2)
    assert replicas(0.1, 3.0, 5.0) == (1, 1)


def test_an_arrangement_is_one_kind() -> None:
    pool = Pool(Parallel(1), 1)
    with pytest.raises(AssertionError, match="prefill and decode, or colocated"):
        Arrangement(prefill=pool, colocated=pool)
