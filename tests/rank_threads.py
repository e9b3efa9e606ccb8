"""A worker of several ranks in one process: every rank but the leader is a thread, the connections are real."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.engine import Engine, load_engine, load_follower
from engine.model_source import ModelFiles
from engine.ranks import Member, Ranks, Rendezvous

TIMEOUT_S = 20.0
END_S = 10.0


@dataclass
class RankThreads:
    """`errors` holds what ended a rank that was not told to stop."""

    config: EngineConfig
    files: ModelFiles
    timeout_s: float
    rendezvous: Rendezvous = field(default_factory=Rendezvous.open)
    errors: dict[int, Exception] = field(default_factory=dict)

    def ranks(self, rank: int) -> Ranks:
        rendezvous = self.rendezvous if rank == 0 else Rendezvous.reach(self.rendezvous.address)
        return Ranks(Member(rank, *self.config.parallel), rendezvous, self.timeout_s)

    def follow(self, rank: int) -> None:
        try:
            load_follower(self.config, self.files, self.ranks(rank)).follow()
        except Exception as error:
            self.errors[rank] = error

    def lead(self) -> Engine:
        return load_engine(self.config, self.files, self.ranks(0))


@asynccontextmanager
async def rank_threads(
    config: EngineConfig, files: ModelFiles, timeout_s: float = TIMEOUT_S
) -> AsyncIterator[tuple[Engine, RankThreads]]:
    """The leader's engine. All ranks have ended when the context is left."""
    worker = RankThreads(config, files, timeout_s)
    threads = [threading.Thread(target=worker.follow, args=(rank,)) for rank in range(1, config.ranks)]
    for thread in threads:
        thread.start()
    engine = worker.lead()
    try:
        yield engine, worker
    finally:
        await engine.runner.close()
        for thread in threads:
            thread.join(END_S)
        assert not any(thread.is_alive() for thread in threads), "a rank did not end"
