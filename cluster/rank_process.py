"""The ranks of a worker that are not its leader: what each does, and how they are started beside the leader, as its
child processes on this machine.

    leader   order on stdin ─▶ rank: load its share ─▶ join ─▶ follow until the leader says stop
             stdin closes   ─▶ rank: ends at once, whatever it does

So no rank outlives its leader; and the leader watches its ranks, and ends when one of them does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.config import TandemConfig, from_json, to_json
from cluster.environment import child_environment
from cluster.logs.lines import set_up_logs
from engine.engine import load_follower
from engine.errors import ConfigError, TandemError
from engine.model_source import resolve, silent
from engine.ranks import Member, RankLost, Ranks, Rendezvous

USAGE_EXIT_CODE = 2
CRASH_EXIT_CODE = 1
# A rank that was told to stop has nothing left to do.
STOP_S = 5.0


def follow_leader(config: TandemConfig, rank: int, address: str, host: str) -> None:
    """Runs one rank until its leader says stop. `address` is the rendezvous, `host` this machine's for other ranks.

    Raises TandemErrors for what cannot be loaded, of which the leader has been told, and RankLost when another rank is
    gone.
    """
    rendezvous = Rendezvous.reach(address)
    try:
        files = resolve(config.engine.model, silent)
        follower = load_follower(config.engine, files, Ranks(Member(rank, *config.engine.parallel, host), rendezvous))
    except TandemError as error:
        rendezvous.fail(rank, str(error))
        raise
    follower.follow()


class RankProcesses:
    """The running child processes, by rank."""

    def __init__(self, rendezvous: Rendezvous, processes: dict[int, asyncio.subprocess.Process]) -> None:
        self.rendezvous = rendezvous
        self._processes = processes

    @property
    def pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in self._processes.items()}

    async def watch(self) -> None:
        """Waits for the first rank to end. Raises ConfigError with what it could not load, else RankLost."""
        waits = {asyncio.create_task(process.wait()): rank for rank, process in self._processes.items()}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self.rendezvous.abandon()
        ended = next(iter(done))
        rank, code = waits[ended], ended.result()
        if problem := self.rendezvous.problem(rank):
            raise ConfigError(f"rank {rank}: {problem}")
        raise RankLost(f"rank {rank} " + (f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"))


@asynccontextmanager
async def rank_processes(config: TandemConfig) -> AsyncIterator[RankProcesses]:
    """Starts all ranks but the leader; ends them when the context is left."""
    rendezvous = Rendezvous.open()
    running: dict[int, asyncio.subprocess.Process] = {}
    try:
        for rank in range(1, config.engine.ranks):
            running[rank] = await _start(config, rank, rendezvous.address)
        yield RankProcesses(rendezvous, running)
    finally:
        rendezvous.abandon()
        for process in running.values():
            await _end(process)


async def _start(config: TandemConfig, rank: int, address: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "cluster.rank_process",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        env=child_environment(config.engine.threads),
        # Ctrl-C in the terminal is for the leader, which then ends the others in order.
        start_new_session=True,
    )
    assert process.stdin is not None, "stdin is a pipe"
    process.stdin.write(json.dumps({"rank": rank, "address": address, "config": to_json(config)}).encode() + b"\n")
    await process.stdin.drain()
    return process


async def _end(process: asyncio.subprocess.Process) -> None:
    """A rank whose leader has said stop ends by itself; any other ends when its stdin does."""
    assert process.stdin is not None, "stdin is a pipe"
    process.stdin.close()
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def main() -> int:
    """One rank as a process. Its order comes as one line of JSON."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    config = from_json(order["config"])
    set_up_logs(config.logging)
    try:
        follow_leader(config, order["rank"], order["address"], "127.0.0.1")
    except TandemError:
        # The leader has been told, and says it.
        return USAGE_EXIT_CODE
    except RankLost as error:
        print(f"rank {order['rank']}: {error}", file=sys.stderr, flush=True)
        return CRASH_EXIT_CODE
    return 0


def _end_with_stdin() -> None:
    while sys.stdin.readline():
        pass
    # Not sys.exit: in a thread that would end the thread only.
    os._exit(CRASH_EXIT_CODE)


if __name__ == "__main__":
    sys.exit(main())
