"""Workers die, freeze and are cut off, from seeds: every client gets the one right answer, and nothing is left."""

import pytest

from tests.sim.faults import simulate


@pytest.mark.parametrize("seed", range(100))
def test_seed(seed: int):
    simulate(seed, requests=35)


def test_requests_outlive_their_workers():
    worlds = [simulate(seed, requests=80, rate_s=30.0) for seed in range(3000, 3010)]
    assert sum(world.deaths for world in worlds) > 10
    assert sum(world.cuts for world in worlds) > 3
    assert sum(world.freezes for world in worlds) > 3
    assert sum(world.tampered for world in worlds) > 10
    receipts = [client.complete.receipt for world in worlds for client in world.clients if client.complete is not None]
    assert sum(receipt.retries for receipt in receipts) > 50


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(100_000, 110_000, 100))
def test_ten_thousand_seeds(first: int):
    for seed in range(first, first + 100):
        simulate(seed, requests=35)
