"""Workers die, freeze and are cut off, from seeds: every client gets the one right answer, and nothing is left."""

import os
from collections.abc import Iterable

import pytest

from cluster.planning.forked import forked
from tests.sim.faults import simulate, simulate_shut_in


def simulate_all(seeds: Iterable[int]) -> None:
    """On all cores; the first seed that fails, by its number, raises."""
    with forked(_simulate, os.cpu_count() or 1) as simulate_each:
        for _ in simulate_each(seeds):
            pass


def _simulate(seed: int) -> None:
    # What a world holds stays where it was: only an error comes back.
    simulate(seed, requests=35)


@pytest.mark.timeout(1200)  # Two minutes on two free cores.
def test_five_hundred_seeds():
    simulate_all(range(500))


def test_requests_outlive_their_workers():
    worlds = [simulate(seed, requests=80, rate_s=30.0) for seed in range(3000, 3010)]
    assert sum(world.deaths for world in worlds) > 10
    assert sum(world.cuts for world in worlds) > 3
    assert sum(world.freezes for world in worlds) > 3
    assert sum(world.shut_ins for world in worlds) > 3
    assert sum(world.tampered for world in worlds) > 10
    assert sum(client.reads_after_s > 0 for world in worlds for client in world.clients) > 100
    receipts = [client.complete.receipt for world in worlds for client in world.clients if client.complete is not None]
    assert sum(receipt.retries for receipt in receipts) > 50


def test_a_decode_worker_without_a_way_to_the_prefill_pool_takes_it_from_nobody():
    """It names one healthy prefill worker after another, fails everything quickly, and looks the least loaded."""
    worlds = [simulate_shut_in(seed, requests=150, rate_s=20.0) for seed in range(5000, 5010)]
    assert sum(world.absent_s for world in worlds) < 5.0
    receipts = [client.complete.receipt for world in worlds for client in world.clients if client.complete is not None]
    assert 0 < sum(receipt.retries for receipt in receipts) < 80


@pytest.mark.parametrize("seed", [100_435, 105_527])
def test_who_fetches_again_does_not_hold_what_others_wait_for(seed: int):
    """KV that was fetched again waited for blocks of a prefill worker, which were held by those that waited for its
    blocks on the decode worker."""
    simulate(seed, requests=35)


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(100_000, 110_000, 1000))
def test_ten_thousand_seeds(first: int):
    simulate_all(range(first, first + 1000))
