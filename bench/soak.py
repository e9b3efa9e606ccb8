"""Hours of mixed load on a real service of plain processes: does anything grow, is anything left behind?

    python -m bench.soak --hours 2 --streams 4

Clients of all kinds ask at once: answers read to their end, abandoned midway, read slowly, past their deadline, of
several choices, with shared beginnings, and requests that must be refused. Every few minutes all of them rest: then the
pools must be empty, and every process is looked at. The last hour is compared with the first after a warm-up of ten
minutes; of runs shorter than two hours the last half with the first.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from tandem.client import Client

from bench.servers import running, tandem_server

CONFIG = """
engine: {{kv_cache_bytes: {kv_bytes}, threads: 1}}
gateway: {{heartbeat_interval_s: 1}}
cluster: {{prefill: {prefill}, decode: {decode}}}
"""
WARM_UP_S = 600.0
HOUR_S = 3600.0
EMPTY_WITHIN_S = 30.0
BEGINNING = "Once upon a time there was a small town by a wide river, and in it lived people of all kinds. " * 8
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Reading:
    """One process at one time, in seconds since the start."""

    at_s: float
    process: str
    resident_bytes: int
    descriptors: int
    threads: int


class Load:
    """What clients do, and how often each ended how."""

    def __init__(self, client: Client, rng: random.Random) -> None:
        self.ended: Counter[str] = Counter()
        self.surprises: list[str] = []
        self._client = client
        self._rng = rng
        self._kinds: list[tuple[str, Callable[[], Awaitable[None]], grpc.StatusCode | None]] = [
            ("read to its end", self._whole, None),
            ("several choices", self._several, None),
            ("abandoned", self._abandoned, None),
            ("read slowly", self._slow, None),
            ("past its deadline", self._late, grpc.StatusCode.DEADLINE_EXCEEDED),
            ("refused", self._wrong, grpc.StatusCode.INVALID_ARGUMENT),
        ]

    async def stream(self, is_resting: asyncio.Event, is_over: asyncio.Event) -> None:
        """One client after the other, until a rest or the end."""
        while not (is_resting.is_set() or is_over.is_set()):
            name, ask, expected = self._rng.choice(self._kinds)
            try:
                await ask()
                self.ended[name] += 1
            except grpc.aio.AioRpcError as error:
                if error.code() is expected:
                    self.ended[name] += 1
                else:
                    self.surprises.append(f"{name}: {error.code().name}: {error.details()}")

    def _prompt(self) -> str:
        words = " ".join(str(self._rng.randrange(1000)) for _ in range(self._rng.choice([3, 10, 60])))
        return self._rng.choice(["", BEGINNING]) + words

    async def _whole(self) -> None:
        await self._client.complete(self._prompt(), max_tokens=self._rng.choice([1, 16, 48]))

    async def _several(self) -> None:
        await self._client.complete(self._prompt(), max_tokens=16, n=3)

    async def _abandoned(self) -> None:
        async with aclosing(self._client.generate(self._prompt(), max_tokens=200, ignore_eos=True)) as parts:
            for _ in range(self._rng.choice([0, 1, 5])):
                await anext(parts)

    async def _slow(self) -> None:
        async with aclosing(self._client.generate(self._prompt(), max_tokens=16)) as parts:
            async for _ in parts:
                await asyncio.sleep(0.3)

    async def _late(self) -> None:
        prompt, timeout_s = self._prompt(), self._rng.choice([0.01, 0.3])
        await self._client.complete(prompt, max_tokens=400, ignore_eos=True, timeout_s=timeout_s)

    async def _wrong(self) -> None:
        await self._client.complete(self._prompt(), temperature=-1.0)


async def soak(address: str, hours: float, streams: int, rest_every_s: float) -> tuple[Load, list[Reading]]:
    """Raises AssertionError where pools are not empty in time while everybody rests."""
    start_s = time.monotonic()
    readings: list[Reading] = []
    async with Client(address) as client:
        load = Load(client, random.Random(0))
        is_over = asyncio.Event()
        while not is_over.is_set():
            is_resting = asyncio.Event()
            tasks = [asyncio.create_task(load.stream(is_resting, is_over)) for _ in range(streams)]
            await asyncio.sleep(min(rest_every_s, max(0.0, start_s + hours * HOUR_S - time.monotonic())))
            if time.monotonic() >= start_s + hours * HOUR_S:
                is_over.set()
            is_resting.set()
            await asyncio.gather(*tasks)
            await _empty(client)
            readings += read_processes(time.monotonic() - start_s)
    return load, readings


async def _empty(client: Client) -> None:
    give_up_s = time.monotonic() + EMPTY_WITHIN_S
    while True:
        status = await client.status()
        held = {worker.worker_id: worker.blocks_total - worker.blocks_free for worker in status.workers}
        busy = status.requests_running + status.requests_waiting + sum(worker.running for worker in status.workers)
        if not busy and not any(held.values()):
            return
        assert time.monotonic() < give_up_s, f"{busy} requests and the blocks {held} are left"
        await asyncio.sleep(0.5)


def read_processes(at_s: float) -> list[Reading]:
    """The gateway and the workers, which this process has started."""
    found: list[Reading] = []
    ours = {os.getpid()}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) not in ours:
                continue
            ours.add(int(folder.name))
            command = (folder / "cmdline").read_text().replace("\0", " ")
            name = re.search(r"cluster\.cli (?:worker \S+ --id (\S+)|serve)", command)
            if name is not None:
                resident = int((folder / "statm").read_text().split()[1]) * PAGE_BYTES
                descriptors = len(list((folder / "fd").iterdir()))
                found.append(Reading(at_s, name[1] or "gateway", resident, descriptors, int(fields[17])))
        except (OSError, IndexError):
            continue  # It has ended meanwhile.
    return found


def table(readings: Sequence[Reading], hours: float) -> list[str]:
    """Means of the first and of the last part of the run, by process."""
    warm_s = min(WARM_UP_S, hours * HOUR_S / 4)
    part_s = min(HOUR_S, (hours * HOUR_S - warm_s) / 2)
    lines = ["| process | resident, first | last | change | descriptors | threads |", "|---|---|---|---|---|---|"]
    for process in dict.fromkeys(reading.process for reading in readings):
        own = [reading for reading in readings if reading.process == process]
        first = [reading for reading in own if warm_s <= reading.at_s <= warm_s + part_s]
        last = [reading for reading in own if reading.at_s >= own[-1].at_s - part_s]
        means = [sum(reading.resident_bytes for reading in part) / len(part) for part in (first, last)]
        ends = [(max(r.descriptors for r in part), max(r.threads for r in part)) for part in (first, last)]
        lines.append(
            f"| {process} | {means[0] / 1e6:.1f} MB | {means[1] / 1e6:.1f} MB | {means[1] / means[0] - 1:+.2%} "
            f"| {ends[0][0]}, {ends[1][0]} | {ends[0][1]}, {ends[1][1]} |"
        )
    return lines


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rest-every", type=float, default=120.0, help="seconds between two looks")
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--log", type=Path, default=None, help="keeps what the service says there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "tandem.yaml"
        config.write_text(CONFIG.format(kv_bytes=64 << 20, prefill=arguments.prefill, decode=arguments.decode))
        async with running(tandem_server(config), arguments.log) as address:
            load, readings = await soak(address, arguments.hours, arguments.streams, arguments.rest_every)
    print("\n".join(table(readings, arguments.hours)))
    print(", ".join(f"{name} {count}" for name, count in sorted(load.ended.items())))
    print(f"{len(load.surprises)} surprises", *load.surprises[:10], sep="\n")
    raise SystemExit(bool(load.surprises))


if __name__ == "__main__":
    asyncio.run(main())
