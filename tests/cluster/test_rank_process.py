"""Ranks as real processes: they compute together, and none outlives another by more than a bounded time."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from cluster.config import TandemConfig
from cluster.rank_process import rank_processes
from cluster.worker_process import run_worker
from cluster.worker_spec import WorkerSpec
from engine.batch import Batch, Row
from engine.config import EngineConfig
from engine.engine import load_engine
from engine.errors import ConfigError
from engine.model_source import ModelFiles
from engine.ranks import Member, RankLost, Ranks
from tests.e2e.service import parents
from tests.tiny_models import generate, make_runner, prompt_of, save_model

# A process that is gone is noticed by its closed connection: well within this.
NOTICE_S = 5.0
START_S = 60.0


def config(folder: Path, **changes: object) -> TandemConfig:
    engine = EngineConfig(
        model=str(folder), tensor_parallel=2, block_size=4, kv_cache_bytes=1 << 18, dtype="float32", device="cpu"
    )
    return TandemConfig(engine=engine.model_copy(update=changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"))
    # Part of a complete folder; workers do not read it.
    (folder / "tokenizer.json").write_text("{}")
    return folder


async def test_a_killed_rank_ends_the_others_at_once(folder: Path) -> None:
    files, settings = ModelFiles("hf", folder), config(folder)
    plain = make_runner(files)
    async with rank_processes(settings) as others:
        ranks = Ranks(Member(0, 2, 1), others.rendezvous)
        engine = await asyncio.to_thread(load_engine, settings.engine, files, ranks)
        assert await generate(engine.runner, prompt_of(9), 6) == await generate(plain, prompt_of(9), 6)

        async def run_on() -> None:
            while True:
                await engine.runner.run(Batch((Row("s", prompt_of(40), 0, list(range(10)), None),)))

        running, watch = asyncio.create_task(run_on()), asyncio.create_task(others.watch())
        await asyncio.sleep(0.05)
        assert not running.done()
        start = time.monotonic()
        os.kill(others.pids[1], signal.SIGKILL)
        with pytest.raises(RankLost):
            await running
        with pytest.raises(RankLost, match="rank 1 was killed by signal 9"):
            await watch
        assert time.monotonic() - start < NOTICE_S
        await engine.runner.close()
    await plain.close()


async def test_what_a_rank_cannot_load_is_the_workers_error(folder: Path, tmp_path: Path) -> None:
    """The leader's own share would be fine: only the other rank looks into an empty folder."""
    settings = config(tmp_path)
    async with rank_processes(settings) as others:
        ranks = Ranks(Member(0, 2, 1), others.rendezvous)
        watch = asyncio.create_task(others.watch())
        with pytest.raises((ConfigError, RankLost), match="rank 1"):
            await asyncio.to_thread(load_engine, config(folder).engine, ModelFiles("hf", folder), ranks)
        with pytest.raises(ConfigError, match=r"rank 1: .*config\.json"):
            async with asyncio.timeout(START_S):
                await watch


async def test_a_worker_whose_rank_dies_crashes(folder: Path, unused_gateway: str) -> None:
    """So that it is started again with all its ranks; a ConfigError would say that it can never run."""
    settings = config(folder)
    serving = asyncio.Event()
    spec = WorkerSpec("prefill", "p", unused_gateway)
    before = children()
    worker = asyncio.create_task(run_worker(spec, settings, incarnation=1, serving=lambda _: serving.set()))
    await until(serving, worker)
    (rank,) = children() - before
    os.kill(rank, signal.SIGSTOP)
    os.kill(rank, signal.SIGKILL)
    with pytest.raises(RankLost):
        async with asyncio.timeout(NOTICE_S):
            await worker


async def test_a_worker_that_ends_takes_its_ranks_along(folder: Path, unused_gateway: str) -> None:
    before, serving = children(), asyncio.Event()
    spec = WorkerSpec("decode", "d", unused_gateway)
    worker = asyncio.create_task(
        run_worker(spec, config(folder, pipeline_parallel=2), incarnation=1, serving=lambda _: serving.set())
    )
    await until(serving, worker)
    assert len(children() - before) == 3
    worker.cancel()
    async with asyncio.timeout(NOTICE_S):
        await asyncio.wait([worker])
    assert worker.cancelled()
    assert children() == before


@pytest.fixture
def unused_gateway() -> str:
    """Nobody listens: a worker goes on without its gateway."""
    return "127.0.0.1:9"


async def until(serving: asyncio.Event, worker: asyncio.Task[None]) -> None:
    waiting = asyncio.create_task(serving.wait())
    await asyncio.wait([waiting, worker], timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert serving.is_set(), worker


def children() -> set[int]:
    """Process ids of this process's children."""
    return {pid for pid, parent in parents().items() if parent == os.getpid()}
