"""What disaggregation costs the first token, and how much KV leaves before it.

    python -m bench.first_token [--model M] [--prompt-tokens 2048] [--budget 512] [--rounds 5]

Two arms take turns in one run, on the same prefill engine. The whole way: client → gateway → decode worker → prefill
worker, in two processes, KV streaming all the while. And prefill alone: the same process, the same chunks, no service
around. Prints the medians, their ratio, and the share of KV bytes that had left the prefill worker before the first
token was sampled.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from tandem.client import Client, GenerateChunk

from cluster.config import TandemConfig
from cluster.gateway_process import running_gateway
from cluster.heartbeat import report_forever
from cluster.registry import WorkerReport
from cluster.registry_server import send_heartbeat
from cluster.security.tickets import Holder
from cluster.served_model import served_name
from cluster.worker_process import run_worker
from cluster.worker_spec import WorkerSpec
from engine.config import DEFAULT_MODEL, EngineConfig
from engine.engine import Engine, load_engine
from engine.generate import Generator, Prompt
from engine.model_source import resolve
from engine.sampling import SamplingParams
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_server import start_server
from prefill_worker.config import PrefillConfig
from prefill_worker.server import prefill_service
from prefill_worker.worker import PrefillWorker

GREEDY = SamplingParams(temperature=0.0, max_tokens=1)
# Enough tokens for a time per output token, few enough that a round stays short.
ANSWER_TOKENS = 8


class Arguments(argparse.Namespace):
    model: str
    prompt_tokens: int
    budget: int
    rounds: int
    others: bool


async def serve_others(config: TandemConfig) -> None:
    """The child process: gateway and decode worker. Prints the gateway's addresses, for clients and for workers, and
    runs until stdin closes."""
    files = resolve(config.engine.model)
    async with running_gateway(config, files, "127.0.0.1") as gateway:
        spec = WorkerSpec("decode", "decode-0", gateway.registry_address)
        worker = asyncio.create_task(run_worker(spec, config, incarnation=1))
        print(gateway.address, gateway.registry_address, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker


@asynccontextmanager
async def others(arguments: Arguments) -> AsyncIterator[list[str]]:
    """Starts the child process and yields the gateway's two addresses."""
    command = [sys.executable, "-m", "bench.first_token", "--others", "--model", arguments.model]
    pipe = asyncio.subprocess.PIPE
    root = Path(__file__).parents[1]
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=root)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield (await child.stdout.readline()).decode().split()
    finally:
        child.stdin.close()
        await child.wait()


@asynccontextmanager
async def prefill_side(engine: Engine, config: TandemConfig, gateway: str) -> AsyncIterator[PrefillWorker]:
    """A prefill worker in this process, known to the gateway."""
    worker = PrefillWorker(
        engine.runner, config.prefill, worker_id="prefill-0", max_context=engine.model.max_context, prefix_cache=False
    )
    server = await start_server("127.0.0.1:0", [prefill_service(worker)])
    name = served_name(config.engine.model, engine.files)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop)
        channels = Channels()
        stack.push_async_callback(channels.close)

        def report() -> WorkerReport:
            stats = worker.stats()
            return WorkerReport("prefill-0", "prefill", server.address, 1, name, stats, public_key=holder.public_key)

        holder = Holder()
        send = partial(send_heartbeat, channels, gateway)
        changed = asyncio.Event()
        tasks = [
            asyncio.create_task(worker.run()),
            asyncio.create_task(report_forever(report, send, changed=changed, rng=random.Random(1))),
        ]
        try:
            yield worker
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def whole_way(client: Client, prompt: list[int]) -> tuple[float, float]:
    """(seconds to the first token at the client, share of the KV that left before it)."""
    start_s, first_s, share = time.perf_counter(), 0.0, 0.0
    async for part in client.generate(prompt, temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True):
        if isinstance(part, GenerateChunk):
            first_s = first_s or time.perf_counter() - start_s
        else:
            share = part.receipt.kv_bytes_before_first_token / part.receipt.kv_bytes
    return first_s, share


async def alone(engine: Engine, config: TandemConfig, prompt: list[int]) -> float:
    """Seconds to the first token of the same engine and chunks without a service around."""
    generator = Generator(
        engine.runner,
        frozenset(),
        engine.model.max_context,
        token_budget=config.prefill.token_budget,
        prefix_cache=False,
    )
    start_s = time.perf_counter()
    await generator.generate([Prompt(tuple(prompt), GREEDY)])
    return time.perf_counter() - start_s


async def measure(arguments: Arguments, config: TandemConfig) -> list[tuple[float, float, float]]:
    """Per round: seconds the whole way, seconds alone, early share."""
    engine = await asyncio.to_thread(load_engine, config.engine, resolve(arguments.model))
    rng = random.Random(0)
    rounds: list[tuple[float, float, float]] = []
    async with (
        others(arguments) as (address, registry_address),
        Client(address, timeout_s=300) as client,
        prefill_side(engine, config, registry_address),
    ):
        while len((await client.status()).workers) < 2:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)
        for number in track(range(arguments.rounds + 1), "rounds", console=Console(stderr=True)):
            prompts = [[rng.randrange(100, 40_000) for _ in range(arguments.prompt_tokens)] for _ in range(2)]
            first_s, share = await whole_way(client, prompts[0])
            alone_s = await alone(engine, config, prompts[1])
            if number:  # the first round warms both arms up
                rounds.append((first_s, alone_s, share))
    await engine.runner.close()
    return rounds


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--others", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(namespace=Arguments())
    config = TandemConfig(
        engine=EngineConfig(model=arguments.model, prefix_cache=False),
        prefill=PrefillConfig(token_budget=arguments.budget),
        cluster=TandemConfig().cluster.model_copy(update={"grpc_port": 0}),
    )
    if arguments.others:
        asyncio.run(serve_others(config))
        return
    rounds = asyncio.run(measure(arguments, config))
    table = Table(title=f"{arguments.prompt_tokens} prompt tokens, chunks of {arguments.budget}")
    for column in ("round", "TTFT whole way (s)", "prefill alone (s)", "ratio", "KV before first token"):
        table.add_column(column, justify="right")
    for number, (first_s, alone_s, share) in enumerate(rounds, 1):
        table.add_row(str(number), f"{first_s:.3f}", f"{alone_s:.3f}", f"{first_s / alone_s:.3f}", f"{share:.1%}")
    first_s, alone_s, share = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(first / single for first, single, _ in rounds)
    table.add_row("median", f"{first_s:.3f}", f"{alone_s:.3f}", f"{ratio:.3f}", f"{share:.1%}", style="bold")
    Console().print(table)


if __name__ == "__main__":
    main()
