"""The five usual policies: what each of them picks, and that none refuses for objectives."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway_config import RouterConfig
from cluster.prefix_index import BlockNames
from cluster.routing.baselines import BASELINES
from cluster.routing.query import Defer, Impossible, Route
from tests.cluster.routing_bench import NOW, Bench, query

POLICIES = sorted(BASELINES)


def test_every_policy_of_the_configuration_can_be_made() -> None:
    for policy in RouterConfig.model_fields["policy"].annotation.__args__:  # type: ignore[union-attr]
        assert Bench(policy=policy).router.name == policy


def test_round_robin_takes_turns_in_each_pool() -> None:
    bench = Bench("p0", "p1", "p2", "d0", "d1", policy="round_robin")
    routes = [bench.send().route for _ in range(6)]
    assert [route.prefill_id for route in routes] == ["p0", "p1", "p2"] * 2
    assert [route.decode_id for route in routes] == ["d0", "d1"] * 3


def test_random_takes_all_alike() -> None:
    bench = Bench("p0", "p1", "d0", "d1", policy="random")
    pairs = Counter((route.prefill_id, route.decode_id) for route in (bench.route() for _ in range(400)))
    assert len(pairs) == 4
    assert min(pairs.values()) > 60


def test_least_loaded_takes_the_shortest_queue_and_the_shortest_step() -> None:
    bench = Bench("p0", "p1", "d0", "d1", policy="least_loaded")
    bench.report("p0", queued_tokens=500, queued_s=0.1)
    bench.report("d0", running=3, context_tokens=300)
    route = bench.route()
    assert (route.prefill_id, route.decode_id) == ("p1", "d1")
    sent = [bench.send().route for _ in range(4)]
    assert {route.prefill_id for route in sent} == {"p0", "p1"}


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    bench = Bench("p0", "p1", "p2", "p3", "d", policy="power_of_two")
    bench.report("p3", queued_tokens=500, queued_s=0.1)
    picked = Counter(bench.route().prefill_id for _ in range(800))
    # Both draws must fall on the loaded one.
    assert picked["p3"] == pytest.approx(800 / 16, abs=30)


def test_prefix_affinity_follows_the_prefix_until_its_queue_is_longer_than_the_hit() -> None:
    prompt = BlockNames(tuple(range(1000)))
    bench = Bench("p0", "p1", "d0", "d1", policy="prefix_affinity")
    bench.holds("p1", prompt, 800)
    bench.holds("d1", prompt, 800)
    route = bench.route(query(names=prompt))
    assert (route.prefill_id, route.decode_id, route.cached_tokens) == ("p1", "d1", 800)
    for _ in range(2):
        bench.book(Route("p1", "p1:1", "d0", "d0:1", work_s=0.05), query(700))
    assert bench.route(query(names=prompt)).prefill_id == "p0"


@pytest.mark.parametrize("policy", POLICIES)
def test_objectives_out_of_reach_are_no_reason_to_refuse(policy: str) -> None:
    bench = Bench("p", "d", policy=policy)
    bench.report("p", queued_tokens=100_000, queued_s=50.0)
    route = bench.route(query(ttft_s=1e-3, tpot_s=1e-6))
    assert (route.prefill_id, route.decode_id) == ("p", "d")


@pytest.mark.parametrize("policy", POLICIES)
def test_local_only_without_a_prefill_worker(policy: str) -> None:
    assert Bench("d0", "d1", policy=policy).route().is_local
    assert isinstance(Bench("d0", "d1", policy=policy, allow_local=False).ask(), Defer)
    assert isinstance(Bench("p0", policy=policy).ask(), Defer)
    assert isinstance(Bench(policy=policy).ask(), Defer)
    colocated = Bench("c0", "c1", policy=policy, allow_local=False)
    assert {colocated.send().route.decode_id for _ in range(20)} == {"c0", "c1"}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_fits_only_one_worker_goes_there(policy: str) -> None:
    bench = Bench("p0", "p1", "d0", "d1", policy=policy)
    bench.report("d1", blocks_total=8192)
    bench.report("p1", blocks_total=8192)
    route = bench.route(query(70_000))
    assert (route.prefill_id, route.decode_id) == ("p1", "d1")
    assert isinstance(bench.ask(query(140_000)), Impossible)


@given(
    policy=st.sampled_from(POLICIES),
    workers=st.lists(st.sampled_from(["p0", "p1", "p2", "d0", "d1", "c0"]), unique=True, max_size=6),
    draining=st.sets(st.sampled_from(["p0", "d0", "c0"])),
    queues=st.lists(st.integers(0, 5000), min_size=6, max_size=6),
    count=st.integers(1, 5),
)
def test_every_route_names_workers_that_are_there(
    policy: str, workers: list[str], draining: set[str], queues: list[int], count: int
) -> None:
    bench = Bench(policy=policy)
    for name, queued in zip(workers, queues, strict=False):
        bench.report(name, draining=name in draining, queued_tokens=queued, queued_s=queued * 5e-5)
    usable = {name for name in workers if name not in draining}
    for _ in range(count):
        answer = bench.ask(now=NOW + 0.1)
        if isinstance(answer, Defer):
            assert not usable & {"c0", "d0", "d1"}
            continue
        assert isinstance(answer, Route)
        assert answer.decode_id in usable
        assert answer.prefill_id in usable | {""}
        if answer.is_local:
            assert answer.decode_id == "c0" or not usable & {"p0", "p1", "p2", "c0"}
        bench.book(answer, now=NOW + 0.1)
