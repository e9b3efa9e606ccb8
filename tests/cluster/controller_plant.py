"""A cluster that does as the controller says."""

from __future__ import annotations

from dataclasses import replace

from cluster.controller import Attained, ClusterState, Controller, Flip, Scale, WorkerState, by_burden
from cluster.controller_config import ControllerConfig
from cluster.demand import Demand
from cluster.registry import Role
from engine.stats import LoopStats

CONFIG = ControllerConfig(enabled=True)
UNKNOWN = Attained()
IDLE = LoopStats(
    running=0, waiting=0, queued_tokens=0, blocks_total=100, blocks_free=100, blocks_cached=0, block_size=16, steps=0
)
# Four workers' worth of each; large pools bear nearly all of it.
EVEN = Demand(requests=500, prefill=4.0, decode=4.0, prompt_s=0.01, residual_s=0.01, answer_s=0.1, rows=256, ttft_s=1.0)


def pools(prefill: int, decode: int, stats: LoopStats = IDLE) -> tuple[WorkerState, ...]:
    names: list[tuple[str, Role]] = [(f"p{index}", "prefill") for index in range(prefill)]
    names += [(f"d{index}", "decode") for index in range(decode)]
    return tuple(WorkerState(name, role, stats) for name, role in names)


class Plant:
    """Workers that do as they are told at once, or as `after` more decisions say."""

    def __init__(self, prefill: int, decode: int, config: ControllerConfig = CONFIG) -> None:
        self.config = config
        self.controller = Controller(config, prefill + decode)
        self.workers = {worker.worker_id: worker for worker in pools(prefill, decode)}
        self.now = 0.0
        self.actions: list[tuple[float, Flip | Scale]] = []
        self._new = 0

    def count(self, role: Role) -> int:
        return sum(worker.role == role for worker in self.workers.values())

    def decide(self, demand: Demand, attained: Attained = UNKNOWN, stats: LoopStats = IDLE) -> list[Flip | Scale]:
        self.now += self.config.interval_s
        workers = tuple(replace(worker, stats=stats) for worker in self.workers.values())
        actions = self.controller.decide(ClusterState(workers, demand, attained), self.now)
        assert len({type(action) for action in actions}) <= 1, "flips, or a change of the number"
        assert len({action.role for action in actions}) <= 1, "all in one direction"
        for action in actions:
            self.actions.append((self.now, action))
            self.do(action)
        return actions

    def do(self, action: Flip | Scale) -> None:
        if isinstance(action, Flip):
            worker = self.workers[action.worker_id]
            assert worker.role != action.role
            self.workers[action.worker_id] = replace(worker, role=action.role)
        elif action.count > 0:
            self._new += 1
            self.workers[f"n{self._new}"] = WorkerState(f"n{self._new}", action.role, IDLE)
        else:
            del self.workers[by_burden(tuple(self.workers.values()), action.role)[0]]
