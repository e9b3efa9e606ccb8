"""Workers on the nodes of a real Ray cluster that have the labels asked for; run by test_on_ray.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.cluster_config import ClusterConfig
from cluster.config import TandemConfig
from cluster.environment import prepare_ray
from cluster.ray_thread import RayThread
from engine.errors import ConfigError

pytestmark = pytest.mark.ray
PREFILL, DECODE = {"pool": "prefill"}, {"pool": "decode"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes with two CPUs and what Ray takes for a GPU each, that this process has joined."""
    prepare_ray(is_local=True)
    import ray
    from ray.cluster_utils import Cluster

    there = Cluster()
    try:
        for labels in (DECODE, PREFILL):
            there.add_node(num_cpus=2, num_gpus=1, labels=labels, object_store_memory=80 << 20, include_dashboard=False)
        ray.init(there.address, log_to_driver=False)
        yield there.address
    finally:
        ray.shutdown()
        there.shutdown()


def config_of(address: str, **cluster: object) -> TandemConfig:
    values = {"address": address, "prefill_nodes": PREFILL, "decode_nodes": DECODE, "placement": "SPREAD", **cluster}
    return TandemConfig(cluster=ClusterConfig.model_validate(values))


async def test_each_role_on_its_nodes(address: str):
    import ray
    from ray.util import placement_group_table

    from cluster.ray_seats import RaySeats

    thread = RayThread()
    seats = RaySeats(config_of(address), thread)
    roles = ("prefill", "decode", "decode", "prefill")
    try:
        taken = await seats.take(roles)
        labels = {node["NodeID"]: node["Labels"]["pool"] for node in ray.nodes()}
        placed = placement_group_table(taken[0].group)["bundles_to_node_id"]
        assert [labels[placed[seat.first]] for seat in taken] == list(roles)
        assert [[seats.suits(seat, role) for role in ("prefill", "decode")] for seat in taken[:2]] == [
            [True, False],
            [False, True],
        ]
    finally:
        await thread.call(seats.give_back)
        thread.close()


@pytest.mark.parametrize(("count", "share"), [(1, 1.0), (2, 1.0), (3, 1 / 2), (5, 1 / 3)])
async def test_workers_that_share_gpus_can_be_placed(address: str, count: int, share: float):
    from cluster.ray_seats import RaySeats

    thread = RayThread()
    nodes = {"prefill_nodes": {}, "decode_nodes": {}}
    seats = RaySeats(config_of(address, **nodes, cpus_per_worker=0.5, start_timeout_s=10), thread)
    try:
        taken = await seats.take(["decode"] * count)
        assert {seat.bundle["GPU"] for seat in taken} == {share}
    finally:
        await thread.call(seats.give_back)
        thread.close()


@pytest.mark.parametrize(
    ("prefill_nodes", "expected"),
    [
        (
            {"pool": "elsewhere"},
            r"expected no more than .* on nodes with \{'pool': 'decode'\} and \{'pool': 'elsewhere'\}",
        ),
        ({"a b": "c"}, r"cluster.prefill_nodes, cluster.decode_nodes: .*`a b`"),
    ],
)
async def test_nodes_that_do_not_exist(address: str, prefill_nodes: dict[str, str], expected: str):
    from cluster.ray_seats import RaySeats

    thread = RayThread()
    seats = RaySeats(config_of(address, prefill_nodes=prefill_nodes, start_timeout_s=1), thread)
    try:
        with pytest.raises(ConfigError, match=expected):
            await seats.take(("prefill", "decode"))
    finally:
        thread.close()


async def test_the_cluster_of_this_node(address: str, monkeypatch: pytest.MonkeyPatch):
    from cluster.ray_address import check_reachable, find_address

    monkeypatch.setenv("RAY_ADDRESS", address)
    assert find_address("auto") == address
    await check_reachable(find_address("auto"))
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match="HOST:PORT in RAY_ADDRESS: Invalid address format: http://127"):
        find_address("auto")
    assert find_address("10.0.0.1:6379") == "10.0.0.1:6379"
