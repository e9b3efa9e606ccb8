"""The whole cluster under random traffic, from seeds: every answer is right, and nothing is left at the end."""

import pytest

from tests.sim.world import simulate


@pytest.mark.parametrize("seed", range(200))
def test_seed(seed: int):
    # Single steps, several at once, one scheduled ahead.
    simulate(seed, requests=35, schedule_ahead=seed % 3 == 2, max_steps=32 if seed % 3 == 1 else 1)


def test_five_hundred_requests():
    world = simulate(1, requests=500)
    finished = [client for client in world.clients if client.complete is not None]
    assert len(finished) > 250, "most requests come through"
    assert len(finished) < 500, "and some are cut short"


def test_a_crowd_on_small_pools_is_preempted_and_still_gets_the_right_answers():
    worlds = [simulate(seed, 60, rate_s=1000.0, schedule_ahead=seed % 2 == 0) for seed in range(6000, 6010)]
    receipts = [client.complete.receipt for world in worlds for client in world.clients if client.complete is not None]
    assert sum(receipt.preemptions for receipt in receipts) > 20
    assert any(not receipt.prefill_worker for receipt in receipts), "some prompts are computed where they are decoded"


def test_a_seed_gives_the_same_run_every_time():
    def history(seed: int) -> list[object]:
        return [(client.ended_s, client.seen, client.complete) for client in simulate(seed, requests=60).clients]

    assert history(5) == history(5)
