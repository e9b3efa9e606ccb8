"""Where workers sit on a Ray cluster: placement groups with a bundle of resources per rank."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.config import TandemConfig
from cluster.ray_thread import RayThread
from cluster.registry import Role
from cluster.worker_config import ranks_of
from engine.errors import ConfigError

# For a Ray of our own, which has its resources at once; a cluster may have to start machines first.
PLACE_LOCAL_S = 20.0
PLACE_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Seat:
    """The bundles of one worker's ranks: `ranks` of them in `group` from `first` on, `bundle` the resources of each, on
    nodes with the labels `nodes`."""

    group: PlacementGroup
    first: int
    ranks: int
    bundle: dict[str, float]
    nodes: dict[str, str]


class RaySeats:
    """The placement groups of one service. Ray is called in its own thread, `ray_thread`."""

    def __init__(self, config: TandemConfig, ray_thread: RayThread) -> None:
        self._config = config
        self._ray = ray_thread
        self._groups: list[PlacementGroup] = []

    async def take(self, roles: Sequence[Role], there: int = 0) -> list[Seat]:
        """Seats in one new group for workers of these roles; `there`: ranks that the service has already.
        Raises ConfigError where there is no room."""
        ranks = [ranks_of(self._config, role) for role in roles]
        nodes = [self._config.cluster.nodes_of(role) for role in roles]
        bundle = await self._ray.call(self._bundle, there + sum(ranks))
        group = await self._place(bundle, ranks, nodes)
        firsts = itertools.accumulate(ranks, initial=0)
        return [
            Seat(group, first, count, bundle, labels)
            for count, labels, first in zip(ranks, nodes, firsts, strict=False)
        ]

    def suits(self, seat: Seat, role: Role) -> bool:
        """Whether a worker of `role` may have a seat that another one had."""
        return seat.ranks == ranks_of(self._config, role) and seat.nodes == self._config.cluster.nodes_of(role)

    def give_back(self) -> None:
        """Call in Ray's thread."""
        for group in self._groups:
            remove_placement_group(group)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _place(
        self, bundle: dict[str, float], ranks: Sequence[int], nodes: Sequence[dict[str, str]]
    ) -> PlacementGroup:
        """Waits for the bundles, and meanwhile leaves Ray's thread to others. Raises ConfigError."""
        group, too_many = await self._ray.call(self._ask_for, bundle, ranks, nodes)
        cluster = self._config.cluster
        clock = asyncio.get_running_loop().time
        give_up_s = clock() + (cluster.start_timeout_s if cluster.is_remote else PLACE_LOCAL_S)
        self._groups.append(group)
        try:
            while not await self._ray.call(group.wait, PLACE_POLL_S):
                if clock() > give_up_s:
                    raise too_many
                await asyncio.sleep(PLACE_POLL_S)
        except BaseException:
            self._groups.remove(group)
            await self._ray.call(remove_placement_group, group)
            raise
        return group

    def _bundle(self, count: int) -> dict[str, float]:
        cluster = self._config.cluster
        there = _resources().get("GPU", 0.0)
        gpus = cluster.gpus_per_worker
        if gpus is None:
            # A bundle lies within one GPU: 2 GPUs take three halves, but not three times two thirds.
            gpus = 0.0 if self._config.engine.device == "cpu" or not there else 1.0 / math.ceil(count / there)
        bundle = {"CPU": cluster.cpus_per_worker, "GPU": gpus}
        return {name: amount for name, amount in bundle.items() if amount > 0}

    def _ask_for(
        self, bundle: dict[str, float], ranks: Sequence[int], nodes: Sequence[dict[str, str]]
    ) -> tuple[PlacementGroup, ConfigError]:
        """Bundles that are still to be placed, and what to raise if they are not."""
        cluster, count = self._config.cluster, sum(ranks)
        if not bundle:
            raise ConfigError("cluster.cpus_per_worker: got 0, expected more than 0 where workers get no GPU")
        what = "workers" if max(ranks) == 1 else "ranks of workers"
        labels = " and ".join(sorted({f"{labels}" for labels in nodes if labels}))
        too_many = ConfigError(
            f"cluster: got {count} {what} of {bundle} each ({cluster.placement}), expected no more than "
            f"the Ray cluster can place: it has {_resources()}{f', on nodes with {labels}' if labels else ''}"
        )
        needed = {name: amount * count for name, amount in bundle.items()}
        # A Ray of our own never grows, so there is nothing to wait for.
        if not cluster.is_remote and any(_resources().get(name, 0.0) < amount for name, amount in needed.items()):
            raise too_many
        selectors = [of for of, times in zip(nodes, ranks, strict=True) for _ in range(times)]
        try:
            group = placement_group([bundle] * count, cluster.placement, bundle_label_selector=selectors)
        except ValueError as error:
            raise ConfigError(f"cluster.prefill_nodes, cluster.decode_nodes: {error}") from error
        return group, too_many


def _resources() -> dict[str, float]:
    """CPUs and GPUs of the whole cluster, in use or not."""
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {name: amount for name, amount in there.items() if name in ("CPU", "GPU")}
