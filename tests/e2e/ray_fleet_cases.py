"""A fleet of actors on a real Ray that grows and shrinks; run by test_on_ray.py."""

from __future__ import annotations

import pytest

from cluster.cluster_config import ClusterConfig
from cluster.config import TandemConfig
from cluster.environment import prepare_ray
from engine.config import EngineConfig
from tests.cluster.test_fleet_scaling import engine, grow_and_shrink

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
