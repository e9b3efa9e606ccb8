"""The controller's loop on virtual time: wishes reach workers and are kept or forgotten, and fleets are asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from cluster.controller import Attained, Flip
from cluster.controller_config import ControllerConfig
from cluster.controller_loop import ControllerLoop, Sight, attained
from cluster.demand import ANSWERS_MIN, DemandMeter
from cluster.outcomes import Outcome, Reason
from cluster.registry import Registry, Role, WorkerReport
from engine.errors import ConfigError
from engine.objectives import Objectives
from engine.stats import LoopStats
from tests.cluster.fake_decode import on_virtual_time
from tests.eventually import eventually
from tests.planning.linear_cost import LinearCost

STATS = LoopStats(
    running=0, waiting=0, queued_tokens=0, blocks_total=100, blocks_free=100, blocks_cached=0, block_size=16, steps=0
)
OBJECTIVES = Objectives(ttft_s=2.0, tpot_s=0.05)
CONFIG = ControllerConfig(enabled=True, interval_s=1.0, cooldown_s=2.0, window_s=10.0, flip_limit_s=20.0)


class FakeFleet:
    """Names workers, and drains them in some seconds."""

    def __init__(self, roles: dict[str, Role]) -> None:
        self.roles = roles
        self.added: list[str] = []
        self.removed: list[str] = []
        self.problem: str = ""

    def has(self, worker_id: str) -> bool:
        return worker_id in self.roles or worker_id in self.added

    async def add(self, role: Role) -> str:
        await asyncio.sleep(3.0)
        if self.problem:
            raise ConfigError(self.problem)
        self.added.append(f"{role}-new-{len(self.added)}")
        return self.added[-1]

    async def remove(self, worker_id: str) -> None:
        await asyncio.sleep(3.0)
        del self.roles[worker_id]
        self.removed.append(worker_id)


class Bench:
    """A loop under test with workers that report every second, and traffic that comes as `arriving` says."""

    def __init__(self, prefill: int, decode: int, config: ControllerConfig = CONFIG) -> None:
        # 100 prompt tokens take 100 ms; 35 rows decode 70 tokens in 3.15 s.
        prefill_cost = LinearCost(fixed_s=0.0, token_s=1e-3, row_s=1e-3, context_s=0.0)
        self.roles: dict[str, Role] = {f"p{index}": "prefill" for index in range(prefill)}
        self.roles |= {f"d{index}": "decode" for index in range(decode)}
        self.fleet = FakeFleet(self.roles)
        meter = DemandMeter(prefill_cost, replace(prefill_cost, fixed_s=10e-3), config.window_s)
        self.loop = ControllerLoop(config, meter, prefill + decode, self.fleet)
        self.registry = Registry(3.0, 60.0)
        self.draining: set[str] = set()
        self.on_its_way: dict[str, int] = {}
        self.outcomes: list[Outcome] = []
        self.asked: list[tuple[str, str]] = []
        self.avoided: list[str] = []
        self.arriving = (0.0, 100, 71)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        sight = Sight(
            self.registry,
            lambda _: self.outcomes,
            lambda worker_id: self.on_its_way.get(worker_id, 0),
            self.avoided.append,
        )
        for _ in range(ANSWERS_MIN):
            self.loop.answered(100, 0, 71, 71)
        tasks = [asyncio.create_task(work) for work in (self.loop.run(sight), self._beat(), self._arrive())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(ended, asyncio.CancelledError), ended

    def report(self, worker_id: str) -> str:
        """One heartbeat; returns the role that its answer names."""
        stats = replace(STATS, draining=worker_id in self.draining)
        now = asyncio.get_running_loop().time()
        self.registry.heartbeat(WorkerReport(worker_id, self.roles[worker_id], worker_id, 1, "m", stats), now)
        return self.loop.wanted_role(worker_id)

    async def _beat(self) -> None:
        while True:
            for worker_id in list(self.roles):
                if role := self.report(worker_id):
                    self.asked.append((worker_id, role))
            await asyncio.sleep(0.5)

    async def _arrive(self) -> None:
        while True:
            per_s, prompt, answer = self.arriving
            await asyncio.sleep(1 / per_s if per_s else 0.1)
            if per_s:
                self.loop.arrived(prompt, answer, OBJECTIVES)

    async def wished(self) -> tuple[str, str]:
        """The next worker that is asked to change, and its new role."""
        count = len(self.asked)
        await eventually(lambda: len(self.asked) > count, 200.0)
        return self.asked[-1]


# 60 prompts of 100 ms a second want six workers of the eight.
PROMPTS = (60.0, 100, 2)


@on_virtual_time
async def test_a_report_costs_the_same_however_many_workers_there_are():
    bench = Bench(5, 3)
    async with bench.running():
        await asyncio.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench.registry, "all", lambda now: pytest.fail("all workers were looked through"))
            assert bench.report("p0") == ""


@on_virtual_time
async def test_a_flip_is_asked_for_released_and_counted():
    bench = Bench(5, 3)
    bench.arriving = PROMPTS
    async with bench.running():
        worker_id, role = await bench.wished()
        assert (worker_id, role) == ("d0", "prefill")
        assert bench.avoided == ["d0"], (
            "nothing more is sent there, though it has not heard of it before its next report"
        )
        bench.draining.add("d0")
        bench.on_its_way["d0"] = 1
        bench.asked.clear()
        await asyncio.sleep(5.0)
        assert ("d1", "prefill") in bench.asked, "the march goes on"
        assert ("d0", "prefill") not in bench.asked, "not released: a request is on its way there"
        bench.on_its_way.clear()
        await asyncio.sleep(1.0)
        assert ("d0", "prefill") in bench.asked
        bench.draining.clear()
        bench.roles["d0"] = "prefill"
        await asyncio.sleep(1.5)
        assert bench.loop.flip_count == 1
    assert [action for _, action in bench.loop.actions] == [Flip(f"d{index}", "prefill") for index in range(2)]


@on_virtual_time
async def test_a_worker_that_gives_up_is_let_alone(caplog: pytest.LogCaptureFixture):
    bench = Bench(6, 2)
    bench.arriving = PROMPTS
    with caplog.at_level(logging.WARNING):
        async with bench.running():
            await bench.wished()
            bench.draining.add("d0")
            await asyncio.sleep(2.0)
            bench.draining.clear()
            await asyncio.sleep(1.2)
            assert bench.report("d0") == ""
            assert bench.loop.flip_count == 0
            bench.asked.clear()
            await asyncio.sleep(CONFIG.flip_limit_s - 5.0)
            assert not bench.asked, "and nobody is bothered for a while"
    assert "d0 does not become a prefill worker" in caplog.text


@on_virtual_time
async def test_a_flip_is_called_off_when_nobody_else_would_be_left():
    """Those asked to leave the role drain, and then the last that was to stay is lost."""
    bench = Bench(6, 2)
    bench.arriving = PROMPTS
    async with bench.running():
        worker_id, _ = await bench.wished()
        bench.draining.add(worker_id)
        [left] = [name for name, role in bench.roles.items() if role == "decode" and name != worker_id]
        del bench.roles[left]
        await asyncio.sleep(5.0)
        assert bench.report(worker_id) == "decode"
        assert bench.loop.flip_count == 0


@on_virtual_time
async def test_a_worker_that_drains_for_a_forgotten_wish_is_told_to_go_on():
    bench = Bench(4, 4)
    async with bench.running():
        await asyncio.sleep(2.0)
        bench.draining.add("d0")
        assert bench.report("d0") == "decode"
        assert bench.report("d1") == ""


@on_virtual_time
async def test_a_worker_that_never_answers_is_forgotten():
    """It reports, and does not drain: an older worker that knows nothing of roles."""
    bench = Bench(3, 5)
    bench.arriving = PROMPTS
    async with bench.running():
        await bench.wished()
        await asyncio.sleep(2 * CONFIG.flip_limit_s + 25.0)
        actions = [action for _, action in bench.loop.actions]
        assert len(actions) >= 2, "after that it tries again"


@on_virtual_time
async def test_a_worker_that_vanishes_is_forgotten():
    bench = Bench(3, 5)
    bench.arriving = PROMPTS
    async with bench.running():
        await bench.wished()
        del bench.roles["d0"]
        bench.asked.clear()
        worker_id, _ = await bench.wished()
        assert worker_id == "d1"


SCALING = CONFIG.model_copy(update={"min_workers": 2, "max_workers": 9})


@on_virtual_time
async def test_workers_are_added_one_at_a_time():
    bench = Bench(4, 2, SCALING)
    bench.arriving = (90.0, 100, 2)
    async with bench.running():
        # Flips first, as far as they help.
        worker_id, role = await bench.wished()
        bench.roles[worker_id] = role  # type: ignore[assignment]
        await eventually(lambda: bench.fleet.added, 200.0)
        await asyncio.sleep(30.0)
        assert bench.fleet.added == ["prefill-new-0"], "nothing more before it is there"
        bench.roles["prefill-new-0"] = "prefill"
        await eventually(lambda: len(bench.fleet.added) == 2, 200.0)


@on_virtual_time
async def test_a_worker_that_is_not_needed_is_removed():
    bench = Bench(4, 4, SCALING)
    bench.arriving = (10.0, 100, 20)
    async with bench.running():
        await eventually(lambda: bench.fleet.removed, 200.0)
        (gone,) = bench.fleet.removed
        assert gone not in bench.roles
        assert gone not in {worker.report.worker_id for worker in bench.registry.all(asyncio.get_running_loop().time())}


@on_virtual_time
async def test_a_fleet_without_room_is_asked_again_later(caplog: pytest.LogCaptureFixture):
    bench = Bench(5, 1, SCALING)
    bench.arriving = (90.0, 100, 2)
    bench.fleet.problem = "cluster: no GPU is left"
    with caplog.at_level(logging.WARNING):
        async with bench.running():
            await asyncio.sleep(40.0)
            assert caplog.text.count("no prefill worker more: cluster: no GPU is left") == 1
            bench.fleet.problem = ""
            await asyncio.sleep(60.0)
    assert bench.fleet.added == ["prefill-new-0"]


def outcome(reason: Reason, ttft_s: float | None = 1.0, tpot_s: float | None = 0.04) -> Outcome:
    return Outcome(0.0, OBJECTIVES, ttft_s, tpot_s, False, reason)


def test_attainment_by_objective():
    assert attained([]) == Attained()
    assert attained([outcome("rejected", None, None)] * 5) == Attained(), "which objective would it have missed?"
    ended = [
        outcome("finished"),
        outcome("finished", ttft_s=3.0),
        outcome("finished", tpot_s=0.06),
        outcome("expired", None, None),
        outcome("rejected", None, None),
    ]
    assert attained(ended) == Attained(requests=5, ttft=2 / 4, tpot=2 / 3, total=1 / 5)
