"""A fleet of actors on a real Ray that grows, shrinks and loses a worker for good; run by test_on_ray.py."""

from __future__ import annotations

import pytest

from cluster.cluster_config import ClusterConfig
from cluster.config import TandemConfig
from cluster.environment import prepare_ray
from engine.config import EngineConfig
from engine.errors import ConfigError
from tests.cluster.test_fleet_scaling import engine, grow_and_shrink, started

pytestmark = pytest.mark.ray
__all__ = ["engine"]


async def test_actors_come_and_leave(engine: EngineConfig):
    """Also into the bundles of one that has left, and into new ones."""
    prepare_ray(is_local=True)
    from cluster.launcher import RayFleet

    log: list[str] = []
    controller = {"enabled": True, "max_workers": 3, "min_prefill": 0, "min_workers": 1}
    cluster = ClusterConfig(prefill=0, decode=1, address="ray", drain_s=2, controller=controller)
    await grow_and_shrink(RayFleet(TandemConfig(engine=engine, cluster=cluster), log.append), log)


async def test_a_worker_that_failed_for_good_is_of_the_fleet_no_more(engine: EngineConfig):
    prepare_ray(is_local=True)
    from cluster.launcher import RayFleet

    cluster = ClusterConfig(prefill=0, decode=1, address="ray", drain_s=2, decode_parallel=(7, 1), cpus_per_worker=0.1)
    fleet = RayFleet(TandemConfig(engine=engine, cluster=cluster), print)
    async with started(fleet) as gateway:
        assert fleet.worker_ids() == ["decode-0"]
        with pytest.raises(ConfigError, match=r"worker decode-0: .*tensor_parallel"):
            await gateway.until(lambda: False, fleet)
        assert fleet.worker_ids() == []
        assert not fleet.has("decode-0")
