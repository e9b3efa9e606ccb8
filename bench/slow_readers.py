"""Clients that ask for long answers and never read them, beside a few that do: what do those notice, and what memory
does it take?

    python -m bench.slow_readers [--stalled 1000] [--answer-tokens 128] [--rounds 8] [--slow-reader-s S]

Two services, each a gateway, a prefill and a decode worker as plain processes with one thread, and the default model.
One has eight clients that read, and no others; the other as many, beside all those that never read. Rounds are measured
at each by turns, so that whatever else the machine does hits both alike. A client that never reads is one HTTP/2
connection, written by hand, whose window is closed from the beginning: not a byte of its answer leaves the gateway. It
says that it is alive when it is asked. While its answer is computed it is a request like any other, which is measured
once; the question is what it costs afterwards.

With the default --slow-reader-s nobody is cut off while the benchmark lasts; with less, `unread` tells how many were
not. Memory is what the processes have resident.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tandem.client import Client, GenerateChunk
from tandem.v1 import inference_pb2

from bench.raw_http2 import RST_STREAM, RawConnection
from bench.servers import running, tandem_server
from cluster.loadtest.prompts import WORDS
from engine.config import DEFAULT_MODEL

GENERATE = "/tandem.v1.Inference/Generate"
READERS = 8
PROMPT_WORDS = 16
# The gateway's own limits, with room for as many as a run may have.
ROOM = 4096
POLL_S = 0.5
# Longer than all of it takes.
LONG_S = 8 * 3600.0
# New connections at once: as many as there can be waiting to be taken.
BURST = 100
PAGE_KIB = 4


class Arguments(argparse.Namespace):
    model: str
    stalled: int
    answer_tokens: int
    rounds: int
    slow_reader_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident MiB."""

    gateway: float
    workers: float


@dataclass(slots=True)
class Phase:
    """`tpot_ms`: of every stream of every round."""

    name: str
    tpot_ms: list[float] = field(default_factory=list)
    memory: Memory = Memory(0.0, 0.0)
    unread: int = 0

    @property
    def median_ms(self) -> float:
        return statistics.median(self.tpot_ms)


@dataclass(frozen=True, slots=True)
class Stalled:
    """Clients that never read."""

    connections: list[RawConnection]

    @property
    def cut_off(self) -> int:
        return sum(bool(each.of(1, RST_STREAM)) or each.is_closed.is_set() for each in self.connections)


def configuration(arguments: Arguments) -> dict[str, object]:
    return {
        "engine": {"model": arguments.model, "threads": 1, "kv_cache_bytes": 256 << 20},
        "decode": {"max_queued": ROOM},
        "gateway": {
            "max_waiting": ROOM,
            "default_deadline_s": None,
            "max_stream_s": LONG_S,
            "slow_reader_s": arguments.slow_reader_s,
            # The goodput policy would keep some of them back; here all are to be served.
            "router": {"policy": "least_loaded"},
        },
        "cluster": {"prefill": 1, "decode": 1, "grpc_port": 0},
    }


def request(rng: random.Random, tokens: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        text=" ".join(rng.choice(WORDS) for _ in range(PROMPT_WORDS)),
        sampling_params=inference_pb2.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
    )


@asynccontextmanager
async def stalled_clients(address: str, count: int, tokens: int) -> AsyncIterator[Stalled]:
    """Each is a connection of its own, and one call."""
    connections: list[RawConnection] = []
    rng = random.Random(1)
    try:
        for index in range(count):
            connection = await RawConnection.open(address, window=0)
            connection.call(GENERATE, request(rng, tokens).SerializeToString())
            connections.append(connection)
            if index % BURST == BURST - 1:
                await asyncio.sleep(POLL_S)
        yield Stalled(connections)
    finally:
        await asyncio.gather(*(connection.close() for connection in connections))


async def tpot_ms(client: Client, rng: random.Random, tokens: int) -> float:
    """Of one answer that is read as it comes."""
    loop = asyncio.get_running_loop()
    times: list[float] = []
    parts = client.generate(
        " ".join(rng.choice(WORDS) for _ in range(PROMPT_WORDS)), temperature=0.0, max_tokens=tokens, ignore_eos=True
    )
    async with aclosing(parts):
        async for part in parts:
            if isinstance(part, GenerateChunk):
                times += [loop.time()] * len(part.token_ids)
    assert len(times) == tokens, f"{len(times)} of {tokens} tokens came"
    return 1000 * (times[-1] - times[0]) / (tokens - 1)


@dataclass(frozen=True, slots=True)
class Service:
    """One that runs, and its readers' client."""

    config: Path
    client: Client
    address: str
    rng: random.Random

    async def measure(self, phase: Phase, tokens: int) -> None:
        """One round."""
        phase.tpot_ms += await asyncio.gather(*(tpot_ms(self.client, self.rng, tokens) for _ in range(READERS)))
        phase.memory = memory(self.config)


@asynccontextmanager
async def service(config: Path, tokens: int) -> AsyncIterator[Service]:
    async with running(tandem_server(config)) as address, Client(address) as client:
        ready = Service(config, client, address, random.Random(0))
        await ready.measure(Phase("warm up"), tokens)
        yield ready


async def until_computed(client: Client) -> None:
    """Nothing runs or waits any more: every answer is there, or was given up."""
    while True:
        status = await client.status()
        if not status.requests_running + status.requests_waiting:
            return
        await asyncio.sleep(POLL_S)


def memory(config: Path) -> Memory:
    """Of the service that runs with `config`: its own process, and those that it has started."""
    gateway, workers = 0.0, 0.0
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            words = (process / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            resident = int((process / "statm").read_text().split()[1]) * PAGE_KIB / 1024
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            above = Path(f"/proc/{parent}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(config) in words:
            gateway += resident
        elif str(config) in above:
            workers += resident
    return Memory(gateway, workers)


async def run(arguments: Arguments, folder: Path) -> list[Phase]:
    configs = [folder / f"{name}.yaml" for name in ("alone", "beside")]
    for config in configs:
        config.write_text(json.dumps(configuration(arguments)))
    tokens, count = arguments.answer_tokens, arguments.stalled
    alone, computing = Phase("alone"), Phase("while their answers are computed", unread=count)
    beside, after = Phase("beside unread answers"), Phase("after they have gone")
    async with service(configs[0], tokens) as quiet, service(configs[1], tokens) as busy:
        alone.memory = memory(configs[0])
        async with stalled_clients(busy.address, count, tokens) as stalled:
            await busy.measure(computing, tokens)
            await until_computed(busy.client)
            for _ in range(arguments.rounds):
                await quiet.measure(alone, tokens)
                await busy.measure(beside, tokens)
            beside.unread = count - stalled.cut_off
        await busy.measure(after, tokens)
    return [alone, computing, beside, after]


def report(phases: Sequence[Phase]) -> Table:
    """TPOT of the readers: medians over all their streams, and the middle half."""
    table = Table(title=f"{READERS} clients that read")
    for column in ("", "unread", "TPOT ms", "middle half", "gateway MiB", "workers MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for phase in phases:
        low, _, high = statistics.quantiles(phase.tpot_ms, n=4)
        figures = (f"{phase.median_ms:.1f}", f"{low:.1f} to {high:.1f}")
        table.add_row(
            phase.name, str(phase.unread), *figures, f"{phase.memory.gateway:.0f}", f"{phase.memory.workers:.0f}"
        )
    return table


def main() -> None:
    """Prints one row per phase; exits 1 when the readers' TPOT beside unread answers is more than a tenth longer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--stalled", type=int, default=1000)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--slow-reader-s", type=float, default=LONG_S)
    arguments = parser.parse_args(namespace=Arguments())
    with tempfile.TemporaryDirectory() as folder:
        phases = asyncio.run(run(arguments, Path(folder)))
    Console(width=120).print(report(phases))
    ratio = phases[2].median_ms / phases[0].median_ms
    print(f"beside / alone: {ratio:.3f}")
    if ratio > 1.1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
