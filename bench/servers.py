"""Servers under test: each a process that says when it is ready, and is gone, with all that it started, when its turn
is over."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.engine_processes import ROOT, ArmFailed, environment_of

STOP_TIMEOUT_S = 60.0
STOP_POLL_S = 0.05
# What Tandem and serve_vllm.py print, the address in the first group.
TANDEM_READY = r"^serving .* at (\S+)$"
VLLM_READY = r"^READY (\S+)$"
LINES_KEPT = 30


@dataclass(frozen=True, slots=True)
class Server:
    """`ready` matches the line of stdout that names the address. `is_ours`: runs with our settings of OpenMP; peers
    keep what their users have."""

    command: Sequence[str]
    ready: str
    is_ours: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 600.0


def tandem_server(config: Path) -> Server:
    """A whole service of plain processes, on any free port."""
    serve = ["serve", "--config", str(config), "--address", "none", "--grpc-port", "0"]
    return Server([sys.executable, "-m", "cluster.cli", *serve], TANDEM_READY)


def vllm_server(python: str, script: Path, mode: str, model: str, port: int, extra: Sequence[str] = ()) -> Server:
    """vLLM as ../shared/peers/serve_vllm.py starts it: `mode` is co or pd."""
    command = [python, str(script), mode, "--model", model, "--port", str(port), *extra]
    return Server(command, VLLM_READY, is_ours=False)


@asynccontextmanager
async def running(server: Server, log: Path | None = None) -> AsyncIterator[str]:
    """Yields the server's address. What it says after that goes into `log`, or nowhere. Raises ArmFailed when it ends
    before it is ready, or is not ready in time."""
    process = await asyncio.create_subprocess_exec(
        *server.command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
        env=environment_of(server.is_ours, **server.environment),
        # A group of its own: nothing that it starts outlives it.
        start_new_session=True,
    )
    reader: asyncio.Task[None] | None = None
    try:
        address = await _address(process, server)
        # A full pipe would stop the server.
        reader = asyncio.create_task(_drain(process, log))
        yield address
    finally:
        await _stop(process)
        if reader is not None:
            await reader


async def _address(process: asyncio.subprocess.Process, server: Server) -> str:
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=LINES_KEPT)
    with suppress(TimeoutError):
        async with asyncio.timeout(server.start_timeout_s):
            while line := (await process.stdout.readline()).decode("utf-8", "replace"):
                last.append(line)
                if found := re.search(server.ready, line.strip()):
                    return found.group(1)
            raise ArmFailed(f"{server.command} ended with status {await process.wait()}:\n{''.join(last)}")
    raise ArmFailed(f"{server.command} was not ready after {server.start_timeout_s:g} s:\n{''.join(last)}")


async def _drain(process: asyncio.subprocess.Process, log: Path | None) -> None:
    assert process.stdout is not None
    with open(log or os.devnull, "ab") as kept:  # noqa: ASYNC230 - a line now and then
        while said := await process.stdout.read(1 << 16):
            kept.write(said)
            kept.flush()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                # Not wait(): that also waits for whoever else holds the pipe.
                while process.returncode is None:  # noqa: ASYNC110
                    await asyncio.sleep(STOP_POLL_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
