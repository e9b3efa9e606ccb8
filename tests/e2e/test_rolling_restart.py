"""Every worker of a service is restarted under load, as real processes: no request is lost, and no attempt fails."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from cluster.messages import Complete, GenerateRequest
from cluster.rolling_restart import restart_workers
from engine.sampling import SamplingParams
from tests.e2e.tiny_cluster import START_S, Load, answers, cluster, lives, save
from tests.tiny_models import prompt_of

pytestmark = pytest.mark.timeout(600)
WORKERS = {"prefill-0", "prefill-1", "decode-0", "decode-1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("drain_s", [0.001, pytest.param(20.0, marks=pytest.mark.nightly)])
async def test_every_worker_is_replaced_under_load(folder: Path, drain_s: float):
    expected = await answers(folder)
    log: list[str] = []
    async with cluster(folder, log, drain_s=drain_s) as (gateway, fleet):
        before = lives(gateway)
        load = Load(gateway, expected)
        clients = [asyncio.create_task(load.client(number)) for number in range(6)]
        await asyncio.sleep(1.0)
        await restart_workers(fleet, gateway, START_S, log.append)
        after = lives(gateway)
        await asyncio.sleep(1.0)
        load.is_over = True
        async with asyncio.timeout(60):
            await asyncio.gather(*clients)
    assert set(after) == WORKERS
    assert all(after[name] > before[name] for name in WORKERS)
    assert len(load.completes) > 20
    assert sum(complete.receipt.retries for complete in load.completes) == 0
    assert {complete.receipt.decode_worker for complete in load.completes} == {"decode-0", "decode-1"}
    assert [line for line in log if line.startswith("worker ")] == [
        f"worker {name} has drained; starting it again" for name in sorted(WORKERS)
    ]
    if drain_s < 1.0:
        moved = sum(complete.receipt.retry_s > 0 for complete in load.completes)
        assert moved > 0, "answers that were not done in time went on elsewhere"


async def test_a_second_signal_ends_a_worker_at_once(folder: Path):
    log: list[str] = []
    async with cluster(folder, log, each=1, drain_s=60.0) as (gateway, fleet):
        # Long enough to be there when the worker is told to end.
        params = SamplingParams(temperature=0.0, max_tokens=150, min_tokens=150, n=8)
        parts = gateway.generate(GenerateRequest("", tuple(prompt_of(9)), params))
        await anext(parts)
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT):
            assert fleet.signal("decode-0", number)
        await asyncio.sleep(0.1)
        assert fleet.signal("decode-0", signal.SIGINT), "it drains"
        async with asyncio.timeout(10):
            while "worker decode-0 was killed by signal 2; starting it again (2 more)" not in log:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        rest = [part async for part in parts]
        assert isinstance(rest[-1], Complete)
        assert rest[-1].receipt.retries == 1
