"""Which worker changes its role, and when there are too few or too many. Pure: values in, values out, `now` included.

The load of a split is that of its bottleneck, as a part of what the pool bears within the objectives:

    load(n_p, n_d) = max( prefill demand / bearable_prefill(n_p),  decode demand / bearable_decode(n_d) )

Where the router has decode workers compute prompts too, as many go there as make both pools equally full.

A march towards the split of least load begins when that is clearly less (`min_gain`), when there is need (`busy`, or
attainment below `target`), when several decisions in a row agree, and when the last action has come to rest. A step of
it changes half of the workers that are to change; the next one in the same direction does not wait for these. A step is
never undone before the arrivals themselves have changed (`min_shift`): whatever the workers report meanwhile, constant
demand gives finitely many actions and then none (docs/decisions/0012-controller.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.controller_config import ControllerConfig
from cluster.demand import Demand, bearable_decode, bearable_prefill
from cluster.registry import Role
from engine.stats import LoopStats

# A step in the same direction belongs to the march of the last one for so many times what a step takes.
MARCH = 2.0


@dataclass(frozen=True, slots=True)
class Flip:
    """`worker_id` is to become a worker of `role`."""

    worker_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class Scale:
    """`count` workers of `role` more, or fewer where it is negative."""

    role: Role
    count: int


Action = Flip | Scale


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A fresh worker. `is_changing`: it drains, or has been asked for another role and does not have it yet;
    `becomes` is that role, None where it was not asked for one."""

    worker_id: str
    role: Role
    stats: LoopStats
    is_changing: bool = False
    becomes: Role | None = None

    @property
    def next_role(self) -> Role:
        return self.becomes or self.role


@dataclass(frozen=True, slots=True)
class Attained:
    """Shares of the recently answered requests that met TTFT, and TPOT; `total` of all that ended, rejected or not,
    that met both."""

    requests: int = 0
    ttft: float = 1.0
    tpot: float = 1.0
    total: float = 1.0


@dataclass(frozen=True, slots=True)
class ClusterState:
    """All that decisions rest on. `is_held`: nothing is to be done now: a worker that was asked for is not there yet,
    one still leaves, or the last flip came to nothing."""

    workers: tuple[WorkerState, ...]
    demand: Demand
    attained: Attained = Attained()
    is_held: bool = False


@dataclass(frozen=True, slots=True)
class _Pools:
    """Demand as it is felt, waiting work and misses included, and who there is to meet it."""

    demand: Demand
    prefill: int
    decode: int

    @property
    def count(self) -> int:
        return self.prefill + self.decode


class Controller:
    """Remembers what it did, and what for. One per cluster. `workers`: how many the cluster starts with."""

    def __init__(self, config: ControllerConfig, workers: int) -> None:
        self._config = config
        self._min_workers = workers if config.min_workers is None else config.min_workers
        self._max_workers = workers if config.max_workers is None else config.max_workers
        self._wish: tuple[str, Role] | None = None
        self._agreed = 0
        self._restless_s = -math.inf
        # The last step of each kind: where it went, and the demand it was made for.
        self._flipped: tuple[Role, float] | None = None
        self._flipped_s = -math.inf
        self._scaled: tuple[int, float] | None = None

    def decide(self, state: ClusterState, now: float) -> list[Action]:
        """Flips in one direction, or one change of the number of workers. Call it every `interval_s`."""
        changing = [worker for worker in state.workers if worker.is_changing]
        if state.is_held or any(worker.becomes is None for worker in changing):
            self._restless_s = now
            self._agree(None)
            return []
        pools = self._felt(state)
        actions: list[Action] = []
        if state.demand.requests >= self._config.min_requests and pools.count:
            actions = [*self._flips(pools, state, now)] or [*self._scale(pools, state)]
        first = actions[0] if actions else None
        goes_on = isinstance(first, Flip) and self._is_marching(first.role, now)
        if first is None or (changing and not goes_on):
            # A march need not wait for those on their way, whose answers may be long; anything else does.
            self._agree(None)
            return []
        self._agree(("flip" if isinstance(first, Flip) else "scale", first.role))
        # What was confirmed for the first step of a march holds for the next.
        if self._agreed < self._config.confirmations and not goes_on:
            return []
        if now - self._restless_s < self._config.cooldown_s:
            return []
        self._agree(None)
        self._restless_s = now
        if isinstance(first, Flip):
            self._flipped, self._flipped_s = (first.role, state.demand.mix), now
        else:
            self._scaled = (first.count, _total(state.demand))
        return actions

    def load(self, demand: Demand, prefill: int, decode: int) -> float:
        """The bottleneck's, as a part of what it bears; 1.0 is just borne."""
        if decode == 0:
            return math.inf
        if prefill == 0:
            return (demand.local_cost * demand.prefill + demand.decode) / bearable_decode(demand, decode)
        prompts, rows = bearable_prefill(demand, prefill, self._config.target), bearable_decode(demand, decode)
        of_prefill, of_decode = demand.prefill / prompts, demand.decode / rows
        if demand.has_local and of_prefill > of_decode:
            # Decode workers take prompts over until both pools are as full.
            moved = (demand.prefill * rows - demand.decode * prompts) / (rows + demand.local_cost * prompts)
            return (demand.prefill - moved) / prompts
        return max(of_prefill, of_decode)

    def best_prefill(self, demand: Demand, count: int, now_prefill: int) -> int:
        """How many of `count` workers should prefill; the nearest to `now_prefill` of equals."""
        fewest = min(self._config.min_prefill, count)
        most = max(fewest, count - self._config.min_decode)
        return min(
            range(fewest, most + 1),
            key=lambda prefill: (self.load(demand, prefill, count - prefill), abs(prefill - now_prefill), prefill),
        )

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _agree(self, kind: tuple[str, Role] | None) -> None:
        self._agreed = self._agreed + 1 if kind is not None and kind == self._wish else int(kind is not None)
        self._wish = kind

    def _felt(self, state: ClusterState) -> _Pools:
        workers = [worker for worker in state.workers if not worker.stats.local_only]
        prefill = sum(worker.next_role == "prefill" for worker in workers)
        # What those that change still do is over when they have changed.
        staying = [worker for worker in workers if not worker.is_changing]
        decodes = [worker.stats for worker in staying if worker.role == "decode"]
        demand, attained = state.demand, state.attained
        if len(staying) < len(workers):
            # Queues and misses are those of the split that is being left: by them a march would go too far.
            return _Pools(demand, prefill, len(workers) - prefill)
        window_s = self._config.window_s
        queued_s = sum(worker.stats.queued_s for worker in staying)
        waiting = sum(stats.waiting for stats in decodes)
        # Blocks in use are workers' worth of memory, as rows are of time.
        used = sum(1.0 - stats.blocks_free / stats.blocks_total for stats in decodes)
        rows = sum(stats.running for stats in decodes) / demand.rows
        prompts = demand.prefill + queued_s / window_s
        answers = max(demand.decode + waiting * demand.answer_s / window_s, used, rows)
        if attained.requests >= self._config.min_requests:
            prompts *= 1.0 + max(0.0, self._config.target - attained.ttft)
            answers *= 1.0 + max(0.0, self._config.target - attained.tpot)
        felt = replace(demand, prefill=prompts, decode=answers)
        return _Pools(felt, prefill, len(workers) - prefill)

    def _flips(self, pools: _Pools, state: ClusterState, now: float) -> list[Flip]:
        """Towards the best split of the workers there are: half of the way at least, for a first guess may go too
        far."""
        demand, config = pools.demand, self._config
        present = self.load(demand, pools.prefill, pools.decode)
        has_missed = state.attained.requests >= config.min_requests and state.attained.total < config.target
        if present < config.busy and not has_missed:
            return []
        best = self.best_prefill(demand, pools.count, pools.prefill)
        if best == pools.prefill:
            return []
        role: Role = "prefill" if best > pools.prefill else "decode"
        # A march that is under way goes to its end; only its beginning needs a clear gain.
        least_gain = config.min_gain / 4 if self._is_marching(role, now) else config.min_gain
        gain = 1.0 - self.load(demand, best, pools.count - best) / present
        if gain < least_gain or not self._may_flip(role, state.demand):
            return []
        wanted = (abs(best - pools.prefill) + 1) // 2
        able = by_burden(state.workers, "decode" if role == "prefill" else "prefill")
        return [Flip(worker_id, role) for worker_id in able[:wanted]]

    def _is_marching(self, role: Role, now: float) -> bool:
        """Whether a flip to `role` now belongs to the march of the last one."""
        config = self._config
        step_s = config.cooldown_s + config.confirmations * config.interval_s + config.window_s
        return self._flipped is not None and self._flipped[0] == role and now - self._flipped_s <= MARCH * step_s

    def _may_flip(self, role: Role, demand: Demand) -> bool:
        """Not back, unless the arrivals have turned since."""
        if self._flipped is None or self._flipped[0] == role:
            return True
        turned = demand.mix - self._flipped[1]
        return (turned if role == "prefill" else -turned) >= math.log1p(self._config.min_shift)

    def _scale(self, pools: _Pools, state: ClusterState) -> list[Scale]:
        """One worker more or fewer, or none; only asked when no flip is worth it."""
        demand, count = pools.demand, pools.count
        if count < self._max_workers and self._best_load(pools, count) >= self._config.grow_above:
            role: Role = "prefill" if self.best_prefill(demand, count + 1, pools.prefill) > pools.prefill else "decode"
            return [Scale(role, 1)] if self._may_scale(1, state.demand) else []
        fewest = max(self._min_workers, self._config.min_prefill + self._config.min_decode)
        if count > fewest and self._best_load(pools, count - 1) <= self._config.shrink_below:
            role = "prefill" if self.best_prefill(demand, count - 1, pools.prefill) < pools.prefill else "decode"
            spare = (pools.prefill - self._config.min_prefill, pools.decode - self._config.min_decode)
            has_spare = spare[role == "decode"] > 0
            return [Scale(role, -1)] if has_spare and self._may_scale(-1, state.demand) else []
        return []

    def _best_load(self, pools: _Pools, count: int) -> float:
        best = self.best_prefill(pools.demand, count, pools.prefill)
        return self.load(pools.demand, best, count - best)

    def _may_scale(self, count: int, demand: Demand) -> bool:
        if self._scaled is None or self._scaled[0] == count:
            return True
        grown = math.log(_total(demand) / self._scaled[1])
        return (grown if count > 0 else -grown) >= math.log1p(self._config.min_shift)


def by_burden(workers: Sequence[WorkerState], role: Role) -> list[str]:
    """Those of `role` that may change it, cheapest to drain first: the fewest requests, then the least KV, then by
    name."""
    able = [
        worker for worker in workers if worker.role == role and not worker.is_changing and not worker.stats.local_only
    ]

    def burden(worker: WorkerState) -> tuple[int, int, str]:
        stats = worker.stats
        return stats.running + stats.waiting, stats.blocks_total - stats.blocks_free, worker.worker_id

    return [worker.worker_id for worker in sorted(able, key=burden)]


def _total(demand: Demand) -> float:
    return demand.prefill + demand.decode + 1e-9
