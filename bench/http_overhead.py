"""What the gateway costs a token: by HTTP, by gRPC, and beside no gateway at all.

    python -m bench.http_overhead [--streams 200] [--tokens 200] [--pace-ms 50] [--rounds 5]

One gateway on a CPU of its own; a worker that gives every stream a token every `--pace-ms`, all in one frame, and the
clients on another. Per round each way is measured once, by turns: straight from the worker; through the gateway by
gRPC; through it by OpenAI's HTTP interface, streamed. Reported of each way are medians over the rounds: TPOT of the
median stream, how much longer that is than without a gateway, the 99th percentile of all gaps between tokens, and the
CPU time of the gateway's process per 1,000 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import grpc.aio
import httpx
from rich.console import Console
from rich.table import Table
from tandem.v1 import inference_pb2

from bench.paced_worker import paced_worker
from bench.servers import Server, running
from decode_worker.grpc_transport import GrpcDecodeTransport
from decode_worker.stream import Delta, Submit
from engine.config import DEFAULT_MODEL
from engine.model_source import resolve
from engine.sampling import SamplingParams
from engine.tokenizer import load
from kvtransfer.rpc_channel import Channels

PROMPT = "Tell me a story."
STORY = "Once upon a time there was a fox who lived by the river, and every day it went out to look for something new. "
GENERATE = "/tandem.v1.Inference/Generate"
CONFIG = {
    "cluster": {"grpc_port": 0, "http_port": 0},
    "gateway": {"max_running": 4096, "max_waiting": 4096, "max_stream_s": 3600},
}
READY_S = 20.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# One stream: returns when each of its tokens came.
Stream = Callable[[], Awaitable[list[float]]]
UnaryStream = grpc.aio.UnaryStreamMultiCallable[bytes, bytes]


class Arguments(argparse.Namespace):
    streams: int
    tokens: int
    pace_ms: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One way in one round, in seconds; `cpu_s` is the gateway's per 1,000 tokens."""

    tpot_s: float
    gap_p99_s: float
    cpu_s: float


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def by_grpc(channels: Channels, address: str, tokens: int) -> Stream:
    params = inference_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True)
    message = inference_pb2.GenerateRequest(text=PROMPT, sampling_params=params).SerializeToString()
    method: UnaryStream = channels.get(address).unary_stream(GENERATE)

    async def stream() -> list[float]:
        times = []
        async for _ in method(message):
            times.append(asyncio.get_running_loop().time())
        # The last message has the whole answer.
        return times[:-1]

    return stream


def by_http(address: str, tokens: int) -> Stream:
    body = json.dumps({"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    host, _, port = address.rpartition(":")

    async def stream() -> list[float]:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head + body)
        times: list[float] = []
        while part := await reader.read(1 << 16):
            now = asyncio.get_running_loop().time()
            times += [now] * part.count(b'"text":"')
            if b"[DONE]" in part:
                break
        writer.close()
        return times[:tokens]

    return stream


class Direct:
    """Straight from the worker, by one token stream as a gateway has it."""

    def __init__(self, address: str, tokens: int) -> None:
        self._address = address
        self._params = SamplingParams(max_tokens=tokens)

    async def run(self, streams: int) -> list[list[float]]:
        times: dict[str, list[float]] = {f"r-{index}": [] for index in range(streams)}
        left = streams
        transport = GrpcDecodeTransport()
        async with transport.attach(self._address) as session:
            for request_id in times:
                await session.send(Submit(request_id, (1, 2, 3), self._params, 0))
            async for frame in session.frames():
                now = asyncio.get_running_loop().time()
                for event in frame.events:
                    if isinstance(event, Delta):
                        times[event.request_id].append(now)
                        left -= event.finish_reason is not None
                if not left:
                    break
        await transport.close()
        return list(times.values())


async def ready(address: str) -> None:
    """Until the gateway has heard of the worker."""
    async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(READY_S):
        while (await client.get(f"http://{address}/ready")).is_error:  # noqa: ASYNC110 - as any prober
            await asyncio.sleep(0.1)


async def measure(gateway_pid: int, tokens: int, run: Callable[[], Awaitable[list[list[float]]]]) -> Measured:
    before = cpu_of(gateway_pid)
    streams = await run()
    cpu_s = cpu_of(gateway_pid) - before
    assert all(len(times) == tokens for times in streams), f"tokens are missing: {sorted(map(len, streams))[:3]}"
    gaps = sorted(later - earlier for times in streams for earlier, later in pairwise(times))
    tpots = [(times[-1] - times[0]) / (tokens - 1) for times in streams]
    return Measured(statistics.median(tpots), gaps[len(gaps) * 99 // 100], cpu_s * 1000 / (tokens * len(streams)))


async def main(options: Arguments) -> dict[str, list[Measured]]:
    files = resolve(DEFAULT_MODEL)
    token_ids = load(files).encode(STORY)
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cpus[1:]) or {cpus[0]})
    found: dict[str, list[Measured]] = {"worker alone": [], "gRPC": [], "HTTP": []}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "tandem.yaml"
        config.write_text(json.dumps(CONFIG))
        command = ["-m", "bench.gateway_alone", str(config), str(cpus[0])]
        async with running(Server([sys.executable, *command], r"^serving (.+)$")) as said:
            pid, grpc_address, http_address, registry = said.split()
            async with paced_worker(registry, DEFAULT_MODEL, options.pace_ms / 1e3, token_ids) as worker:
                await ready(http_address)
                channels = Channels()
                ways: dict[str, Stream] = {
                    "gRPC": by_grpc(channels, grpc_address, options.tokens),
                    "HTTP": by_http(http_address, options.tokens),
                }
                direct = Direct(worker, options.tokens)
                for number in range(options.rounds + 1):
                    for name, measured in found.items():

                        async def run(name: str = name) -> list[list[float]]:
                            if name not in ways:
                                return await direct.run(options.streams)
                            return await asyncio.gather(*(ways[name]() for _ in range(options.streams)))

                        one = await measure(int(pid), options.tokens, run)
                        # The first round warms up.
                        if number:
                            measured.append(one)
                await channels.close()
    return found


def show(found: dict[str, list[Measured]]) -> None:
    table = Table("", "TPOT ms", "added ms", "gap p99 ms", "gateway CPU ms / 1,000 tokens")
    middle = {
        name: [statistics.median(getattr(one, key) for one in rounds) for key in ("tpot_s", "gap_p99_s", "cpu_s")]
        for name, rounds in found.items()
    }
    for name, (tpot_s, gap_s, cpu_s) in middle.items():
        added = f"{1e3 * (tpot_s - middle['worker alone'][0]):+.3f}"
        table.add_row(name, f"{1e3 * tpot_s:.3f}", added, f"{1e3 * gap_s:.1f}", f"{1e3 * cpu_s:.1f}")
    Console().print(table)
    tpot, cpu = (middle["HTTP"][key] / middle["gRPC"][key] for key in (0, 2))
    print(f"HTTP / gRPC: TPOT {tpot:.3f}, CPU of the gateway {cpu:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--pace-ms", type=float, default=50.0)
    parser.add_argument("--rounds", type=int, default=5)
    show(asyncio.run(main(parser.parse_args(namespace=Arguments()))))
