"""Workers are restarted under load, one at a time: every client gets the one right answer, and no attempt fails."""

from __future__ import annotations

import pytest

from tests.sim.restarts import RestartingWorld, simulate


def retries_of(world: RestartingWorld) -> int:
    return sum(client.complete.receipt.retries for client in world.clients if client.complete is not None)


@pytest.mark.parametrize("seed", range(30))
def test_seed(seed: int):
    world = simulate(seed, requests=35)
    assert world.restarts >= 4
    assert retries_of(world) == 0


def test_what_is_not_done_in_time_goes_on_elsewhere():
    worlds = [simulate(seed, requests=250, rate_s=80.0, drain_s=0.0) for seed in range(5000, 5006)]
    assert sum(world.restarts for world in worlds) >= 24
    assert sum(map(retries_of, worlds)) == 0, "what is handed back has failed nobody"
    completes = [client.complete for world in worlds for client in world.clients if client.complete is not None]
    assert sum(complete.receipt.retry_s > 0 for complete in completes) > 5, "these had tokens already"


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(20_000, 20_400))
def test_many_seeds(seed: int):
    simulate(seed, requests=120)
