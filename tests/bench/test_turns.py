"""Servers that take turns: real processes that answer as they are told, and the tables made of their answers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.against_vllm import Arguments, arms_of, page, parse, ratio_table, turns_of
from bench.colocated_vs_split import CLUSTERS, configurations, crossover_table
from bench.colocated_vs_split import arms_of as split_arms_of
from bench.colocated_vs_split import parse as parse_split
from bench.colocated_vs_split import turns_of as split_turns_of
from bench.engine_processes import ArmFailed
from bench.servers import VLLM_READY, Server, running
from bench.turns import UNLOADED_REQUESTS, WARM_UP_REQUESTS, Arm, Cell, Store, Turns, take_turns
from bench.turns_report import as_json, best_rate, is_split, pairs_of
from cluster.config import load
from cluster.loadtest.load import Load, Process
from cluster.loadtest.prompts import RandomWords
from cluster.loadtest.record import Record
from cluster.loadtest.request import LoadRequest
from cluster.planning import virtual_loop
from cluster.planning.trace import TraceRequest
from engine.objectives import NO_OBJECTIVES, Objectives
from tests.loadtest.fake_targets import ScriptedTarget, answer

PAIRS = pairs_of(["100,50", "1000,500"])


class Servers:
    """Starts that are remembered, of targets that give four tokens 5 ms apart."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._targets: list[ScriptedTarget] = []

    def arm(self, name: str, first_s: float, *, acts: bool) -> Arm:
        def target(address: str) -> ScriptedTarget:
            assert address == f"{name}:1"
            made = ScriptedTarget(lambda index: answer(first_s, 0.005, 4), name, acts_on_objectives=acts)
            self._targets.append(made)
            return made

        return Arm(name, lambda: self._start(name), target, acts)

    def requests(self, name: str) -> list[LoadRequest]:
        """All that were sent under this name."""
        return [request for target in self._targets if target.name == name for _, request, _ in target.sent]

    @asynccontextmanager
    async def _start(self, name: str) -> AsyncIterator[str]:
        self.notes.append(f"{name} starts")
        yield f"{name}:1"
        self.notes.append(f"{name} ends")


def turns(arms: list[Arm], **changes: Any) -> Turns:
    fields = {
        "pairs": PAIRS,
        "rates_rps": [100.0, 50.0],
        "seeds": (0, 1),
        "load": Load((TraceRequest(None, 4, 4),) * 20, Process(20)),
        "source": lambda run: RandomWords(),
        "pause_s": 0.0,
        **changes,
    }
    return Turns(arms, **fields)


def play(plan: Turns, store: Store) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        await take_turns(replace(plan, clock=loop.time), store, lambda text: None)

    virtual_loop.run(run())


def test_turns(tmp_path: Path) -> None:
    """The peer is too slow for the first pair; no turn of it is ended early, because it meets the second."""
    servers = Servers()
    arms = [servers.arm("peer", 0.15, acts=False), servers.arm("ours", 0.01, acts=True)]
    plan = turns(arms)
    store = Store(tmp_path / "runs.jsonl")
    play(plan, store)
    # One alive at a time, seed after seed.
    lines = ["peer starts", "peer ends", "ours starts", "ours ends"]
    assert servers.notes == lines * 2
    peer, ours = arms
    assert [best_rate(plan, store, peer, pair) for pair in PAIRS] == [0.0, 100.0]
    assert [best_rate(plan, store, ours, pair) for pair in PAIRS] == [100.0, 100.0]
    told = {cell.objectives for cell in store.cells if cell.arm == "ours" and cell.rate_rps}
    assert told == set(PAIRS)
    assert {cell.objectives for cell in store.cells if cell.arm == "peer"} == {NO_OBJECTIVES}
    # The peer's runs are the first of ours, prompt for prompt; those for the second pair have prompts of their own.
    alone = WARM_UP_REQUESTS + UNLOADED_REQUESTS
    theirs, mine = servers.requests("peer"), servers.requests("ours")
    assert (len(theirs), len(mine)) == (2 * (alone + 40), 2 * (alone + 80))
    assert theirs[alone : alone + 40] == mine[alone : alone + 40]
    assert len({request.prompt for request in mine}) == len(mine)
    assert len(store.unloaded(peer)) == 2 * UNLOADED_REQUESTS
    assert "| TTFT 100 ms, TPOT 50 ms | 100 | 0 | – | nothing was split | – |" in ratio_table(plan, store)
    assert "| TTFT 1000 ms, TPOT 500 ms | 100 | 100 | 1.00 |" in page(plan, store)

    again = Store(tmp_path / "runs.jsonl")
    assert json.dumps(as_json(plan, again)) == json.dumps(as_json(plan, store))
    play(plan, again)
    assert servers.notes == lines * 2, "what is done was done again"


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path) -> None:
    servers = Servers()
    plan = turns([servers.arm("peer", 0.15, acts=False)])
    play(replace(plan, seeds=(0,)), Store(tmp_path / "runs.jsonl"))
    play(plan, Store(tmp_path / "runs.jsonl"))
    assert servers.notes == ["peer starts", "peer ends"] * 2
    assert len(servers.requests("peer")) == 2 * (WARM_UP_REQUESTS + UNLOADED_REQUESTS + 40)


def test_a_turn_ends_early_when_nothing_is_attained_any_more(tmp_path: Path) -> None:
    """At the lowest rate already; the higher one is no point, and a new start has nothing to do."""
    servers = Servers()
    slow = servers.arm("slow", 0.15, acts=False)
    plan = turns([slow], pairs=PAIRS[:1], seeds=(0,))
    store = Store(tmp_path / "runs.jsonl")
    play(plan, store)
    assert {cell.rate_rps for cell in store.cells} == {0.0, 50.0}
    assert best_rate(plan, store, slow, PAIRS[0]) == 0.0
    play(plan, store)
    assert servers.notes == ["slow starts", "slow ends"]


async def test_a_server_of_its_own_is_there_and_gone() -> None:
    """With what it started: the child holds the same pipe, which ends only when both are gone."""
    program = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('loading'); "
        "print('READY http://h:1/v1', flush=True); time.sleep(60)"
    )
    async with asyncio.timeout(20), running(Server([sys.executable, "-c", program], VLLM_READY)) as address:
        assert address == "http://h:1/v1"


async def test_a_server_that_ends_or_never_gets_ready() -> None:
    with pytest.raises(ArmFailed, match=r"(?s)ended with status 3:.*oh"):
        async with running(Server([sys.executable, "-c", "print('oh'); exit(3)"], VLLM_READY)):
            pass
    sleeper = Server([sys.executable, "-c", "import time; time.sleep(60)"], VLLM_READY, start_timeout_s=0.3)
    with pytest.raises(ArmFailed, match=r"was not ready after 0\.3 s"):
        async with running(sleeper):
            pass


def record(met: bool, receipt: dict[str, Any] | None = None) -> Record:
    return Record(
        0, 0.0, 0.0, "answered", 1.0, ttft_s=0.1 if met else 9.0, tpot_s=0.01, gaps_s=(0.01, 0.03), receipt=receipt
    )


def filled(plan: Turns, path: Path, attained: dict[tuple[str, float], list[int]]) -> Store:
    """Ten requests a run; `attained` says how many of them met every pair, seed by seed."""
    store = Store(path)
    for (name, rate), counts in attained.items():
        arm = next(arm for arm in plan.arms if arm.name == name)
        for seed, count in zip(plan.seeds, counts, strict=False):
            records = [record(index < count, {"prefill_worker": "p", "decode_worker": "d"}) for index in range(10)]
            for pair in plan.pairs if arm.acts else [NO_OBJECTIVES]:
                store.add(Cell(name, seed, rate, pair), records)
    return store


def test_ratios(tmp_path: Path) -> None:
    """Seeds are pooled; a rate that one seed did not reach is none."""
    plan = turns_of(arguments(tmp_path, "--rates", "1,2,3", "--seeds", "2", "--slo", "500,50"), arms(tmp_path))
    attained = {
        ("vLLM colocated", 1.0): [10, 10],
        ("vLLM colocated", 2.0): [10, 8],
        ("vLLM colocated", 3.0): [5],
        ("vLLM 1P+1D", 1.0): [10, 9],
        ("vLLM 1P+1D", 2.0): [8, 9],
        ("Tandem", 1.0): [10, 10],
        ("Tandem", 2.0): [10, 10],
        ("Tandem", 3.0): [9, 9],
    }
    store = filled(plan, tmp_path / "r.jsonl", attained)
    store.add(Cell("Tandem", 0, 0.0, NO_OBJECTIVES), [record(True)] * 3)
    table = ratio_table(plan, store)
    # The 99th percentile of as many gaps of 10 as of 30 ms is 30, three times the unloaded 10 ms.
    assert "| TTFT 500 ms, TPOT 50 ms | 3 | 2 | 1.50 | 30 ms | 3.00 |" in table
    assert "| 2 | 0.90 (1.00 0.80) | 0.85 (0.80 0.90) | 1.00 (1.00 1.00) |" in page(plan, store)


def test_the_crossover(tmp_path: Path) -> None:
    given = parse_split(["--out", str(tmp_path), "--rates", "1,2,3", "--seeds", "1", "--slo", "500,50"])
    plan = split_turns_of(given, split_arms_of(given))
    attained = {
        ("split", 1.0): [10],
        ("split", 2.0): [8],
        ("split", 3.0): [7],
        ("colocated", 1.0): [9],
        ("colocated", 2.0): [9],
        ("colocated", 3.0): [3],
        ("own", 1.0): [10],
        ("own", 2.0): [9],
        ("own", 3.0): [8],
    }
    store = filled(plan, tmp_path / "r.jsonl", attained)
    row = "| TTFT 500 ms, TPOT 50 ms | 1 | 2 | colocated | 1 to 2, 2 to 3 | 2 | yes |"
    assert row in crossover_table(plan, store)


def test_configurations_are_ones_that_serve_takes(tmp_path: Path) -> None:
    given = parse_split(["--out", str(tmp_path), "--model", "some"])
    for name, path in configurations(given).items():
        config = load(path)
        assert config.engine.model == "some"
        assert config.cluster.prefill == CLUSTERS[name]["prefill"]
        assert (config.gateway.router.policy == "goodput") == (name == "own")


def arguments(folder: Path, *more: str) -> Arguments:
    given = ["--vllm-python", "py", "--hf-folder", "hf", "--config", "c.yaml", "--out", str(folder), *more]
    return parse(given)


def server_of(arm: Arm) -> Server:
    assert isinstance(arm.start, partial)
    [server] = arm.start.args
    return server


def arms(folder: Path) -> list[Arm]:
    return arms_of(arguments(folder))


def test_the_arms_of_the_comparison(tmp_path: Path) -> None:
    colocated, split, ours = arms(tmp_path)
    first, second, third = (server_of(arm) for arm in (colocated, split, ours))
    assert list(first.command)[2:] == ["co", "--model", "hf", "--port", "8100"]
    assert list(second.command)[2:] == ["pd", "--model", "hf", "--port", "8200"]
    assert list(third.command)[1:4] == ["-m", "cluster.cli", "serve"]
    assert (colocated.acts, split.acts, ours.acts) == (False, False, True)
    assert (first.is_ours, second.is_ours, third.is_ours) == (False, False, True)
    plan = turns_of(arguments(tmp_path), arms(tmp_path))
    assert plan.pairs == [Objectives(1.5, 0.09), Objectives(2.5, 0.06), Objectives(3.0, 0.2)]
    assert (plan.load.count, len(plan.seeds)) == (150, 3)


@pytest.mark.parametrize(
    ("receipt", "expected"),
    [
        (None, False),
        ({"prefill_worker": "", "decode_worker": "d"}, False),
        ({"prefill_worker": "d", "decode_worker": "d"}, False),
        ({"prefill_worker": "p", "decode_worker": "d"}, True),
    ],
)
def test_what_was_disaggregated(receipt: dict[str, Any] | None, expected: bool) -> None:
    assert is_split(record(True, receipt)) is expected
