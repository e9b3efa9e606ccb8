"""A gateway in a process of its own, without workers: for benchmarks that bring theirs.

    python -m bench.gateway_alone CONFIG CPU

Prints its process id, and where it is reached: gRPC, HTTP, workers' reports. Bound to one CPU.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from cluster.collector import set_aside_what_is_loaded
from cluster.commands.running import run
from cluster.config import load
from cluster.gateway_process import running_gateway
from engine.model_source import resolve


async def serve(path: Path, cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    config = load(path)
    async with running_gateway(config, resolve(config.engine.model), "127.0.0.1") as running:
        set_aside_what_is_loaded()
        addresses = (running.address, running.http_address, running.registry_address)
        print("serving", os.getpid(), *addresses, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    run(serve(Path(sys.argv[1]), int(sys.argv[2])))
