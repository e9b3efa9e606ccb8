"""How long a client's disconnect takes to free everything, in every phase of a request.

    python -m bench.disconnect [--model M] [--trials 40] [--prompt-tokens 1024] [--schedule-ahead]

One prefill and one decode worker, the real model, real gRPC on every hop, and a client that closes its call.
Freed means: neither worker computes for the request any more, and neither pool holds a block of it. A forward pass
cannot be stopped, and a decode worker that schedules ahead may have handed over the next one as well. So the bound is
one step, or those two, and 250 ms: what is printed is the time from the disconnect until everything was free, less the
one run that took most of it, from its being handed over to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import grpc
import grpc.aio
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tandem.client import Client

from bench.one_process import Service, serving
from cluster.collector import set_aside_what_is_loaded
from cluster.gateway_config import GatewayConfig, RouterConfig
from cluster.messages import ModelInfo
from cluster.served_model import describe
from decode_worker.config import DecodeConfig
from engine.batch import Batch, KVLayout, LayerListener, Runner, StepOutput
from engine.config import DEFAULT_MODEL, EngineConfig
from engine.engine import load_engine
from engine.model_source import resolve
from engine.tokenizer import Tokenizer
from engine.tokenizer import load as load_tokenizer
from prefill_worker.config import PrefillConfig

BOUND_S = 0.25
# In the phase "mid-transfer" each frame of 64 KiB takes this long to read: a link of some 16 MB/s.
FRAME_BYTES = 64 << 10
SLOW_LINK_FRAME_S = 0.004
POLL_S = 0.001


class TimedRunner:
    """Passes everything on to a runner and remembers when its last steps were handed over and when they ended."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.steps: deque[tuple[float, float]] = deque(maxlen=8)
        self.frame_delay_s = 0.0
        self.export_blocks = runner.export_blocks

    @property
    def layout(self) -> KVLayout:
        return self._runner.layout

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def can_guide(self) -> bool:
        return self._runner.can_guide

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        start_s = asyncio.get_running_loop().time()
        try:
            return await self._runner.run(batch, on_layers)
        finally:
            self.steps.append((start_s, asyncio.get_running_loop().time()))

    def import_blocks(
        self,
        block_ids: Sequence[int],
        first_slot: int,
        layers: range,
        block_tokens: int,
        payload: memoryview,
        dtype: str,
    ) -> None:
        time.sleep(self.frame_delay_s)
        self._runner.import_blocks(block_ids, first_slot, layers, block_tokens, payload, dtype)

    async def close(self) -> None:
        await self._runner.close()


@dataclass(slots=True)
class Stage:
    """A running service and how to make requests on it."""

    service: Service
    client: Client
    runners: tuple[TimedRunner, TimedRunner]
    rng: random.Random
    prompt_tokens: int

    def prompt(self, tokens: int | None = None) -> list[int]:
        """A prompt that shares no prefix with any other."""
        return [self.rng.randrange(100, 40_000) for _ in range(tokens or self.prompt_tokens)]

    @asynccontextmanager
    async def call(self, tokens: int | None = None, max_tokens: int = 400) -> AsyncIterator[asyncio.Task[None]]:
        """A request under way; leaving the context disconnects its client."""

        async def read() -> None:
            parts = self.client.generate(self.prompt(tokens), temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            async with aclosing(parts):
                async for _ in parts:
                    pass

        task = asyncio.create_task(read())
        try:
            yield task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await task

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event, and must not get one for this
                await asyncio.sleep(POLL_S)


async def freed_after(stage: Stage, is_free: Callable[[], bool], disconnect: Callable[[], Awaitable[object]]) -> float:
    """Seconds from the disconnect until `is_free`, less the one run that took most of them."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    closing = asyncio.ensure_future(disconnect())
    async with asyncio.timeout(60):
        while not is_free():  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
    free_s = loop.time()
    await closing
    steps = [step for runner in stage.runners for step in runner.steps]
    return free_s - start_s - max((min(end, free_s) - max(start, start_s) for start, end in steps), default=0.0)


def is_empty(stage: Stage) -> bool:
    try:
        stage.service.check_empty()
    except AssertionError:
        return False
    return True


async def measure(stage: Stage, reach: Callable[[], bool]) -> float:
    """Starts a request, waits until it is in the phase that `reach` sees, and disconnects its client."""
    call = stage.call()
    await call.__aenter__()
    await stage.until(reach)
    return await freed_after(stage, partial(is_empty, stage), lambda: call.__aexit__(None, None, None))


async def gateway_queue(stage: Stage) -> float:
    """Waits at the gateway, whose one place is taken."""
    gateway = stage.service.gateway
    async with stage.call(tokens=16):
        await stage.until(lambda: gateway.status(0.0).requests_running == 1)
        call = stage.call()
        await call.__aenter__()
        await stage.until(lambda: gateway.status(0.0).requests_waiting == 1)
        is_free = partial(lambda: gateway.status(0.0).requests_waiting == 0)
        taken = await freed_after(stage, is_free, lambda: call.__aexit__(None, None, None))
    await stage.until(partial(is_empty, stage))
    return taken


async def prefill_queue(stage: Stage) -> float:
    """Waits on the prefill worker behind another prompt."""
    worker = stage.service.prefill[0]
    async with stage.call():
        await stage.until(lambda: worker.stats().running == 1)
        call = stage.call()
        await call.__aenter__()
        await stage.until(lambda: worker.stats().waiting == 1)
        is_free = partial(lambda: worker.stats().waiting == 0)
        taken = await freed_after(stage, is_free, lambda: call.__aexit__(None, None, None))
    await stage.until(partial(is_empty, stage))
    return taken


async def mid_prefill(stage: Stage) -> float:
    """Some chunks are computed, some are not."""
    worker = stage.service.prefill[0]
    return await measure(
        stage, lambda: worker.stats().running == 1 and worker.stats().queued_tokens < stage.prompt_tokens // 2
    )


async def mid_transfer(stage: Stage) -> float:
    """The prompt is computed, and its KV is still on its way over a slow link."""
    prefill, decode = stage.service.prefill[0], stage.service.decode[0]

    def is_over() -> bool:
        return decode.stats().running == 1

    def is_computed() -> bool:
        is_held = prefill.stats().blocks_free < prefill.stats().blocks_total
        return is_held and not prefill.stats().running and not prefill.stats().waiting

    stage.runners[1].frame_delay_s = SLOW_LINK_FRAME_S
    try:
        while True:
            call = stage.call()
            await call.__aenter__()
            await stage.until(lambda: is_over() or is_computed())
            # On a busy machine the moment may have passed unseen: then once more.
            was_missed = is_over()
            taken = await freed_after(stage, partial(is_empty, stage), partial(call.__aexit__, None, None, None))
            if not was_missed:
                return taken
    finally:
        stage.runners[1].frame_delay_s = 0.0


async def decode(stage: Stage) -> float:
    """Tokens are coming."""
    return await measure(stage, lambda: stage.service.decode[0].stats().running == 1)


PHASES = (gateway_queue, prefill_queue, mid_prefill, mid_transfer, decode)


class Arguments(argparse.Namespace):
    model: str
    trials: int
    prompt_tokens: int
    schedule_ahead: bool


@dataclass(frozen=True, slots=True)
class Model:
    info: ModelInfo
    tokenizer: Tokenizer | None


async def run_phase(
    phase: Callable[[Stage], Awaitable[float]], runners: tuple[TimedRunner, TimedRunner], model: Model, args: Arguments
) -> list[float]:
    """All trials of one phase, on a service of its own."""
    places = 1 if phase is gateway_queue else 64
    service = serving(
        model.info,
        model.tokenizer,
        [runners[0]],
        [runners[1]],
        # The goodput policy would keep the second prompt at the gateway; here it is to wait on the worker.
        gateway_config=GatewayConfig(
            max_running=places, heartbeat_interval_s=0.2, fresh_s=2.0, router=RouterConfig(policy="least_loaded")
        ),
        # Small chunks and frames, so that there is a middle to be met in.
        prefill_config=PrefillConfig(token_budget=128, max_frame_bytes=FRAME_BYTES),
        decode_config=DecodeConfig(schedule_ahead=args.schedule_ahead),
        prefix_cache=False,
    )
    async with service as running, Client(running.address) as client:
        stage = Stage(running, client, runners, random.Random(0), args.prompt_tokens)
        taken: list[float] = []
        # As in processes that serve.
        set_aside_what_is_loaded()
        try:
            for _ in track(range(args.trials), phase.__name__.replace("_", " "), console=Console(stderr=True)):
                taken.append(await phase(stage))
                running.check_empty()
        finally:
            gc.unfreeze()
        return taken


async def run(args: Arguments) -> dict[str, list[float]]:
    """Seconds until everything was free: phase → one figure per trial."""
    files = resolve(args.model)
    config = EngineConfig(model=args.model, kv_cache_bytes=256 << 20)
    tokenizer = load_tokenizer(files)
    model = Model(describe(config, files, tokenizer), tokenizer)
    engines = [await asyncio.to_thread(load_engine, config, files) for _ in range(2)]
    runners = (TimedRunner(engines[0].runner), TimedRunner(engines[1].runner))
    try:
        return {phase.__name__.replace("_", " "): await run_phase(phase, runners, model, args) for phase in PHASES}
    finally:
        for engine in engines:
            await engine.runner.close()


def main() -> None:
    """Prints one row per phase; exits 1 when a trial missed the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--schedule-ahead", action="store_true")
    args = parser.parse_args(namespace=Arguments())
    results = asyncio.run(run(args))
    table = Table(title="disconnect → all blocks and compute free, beyond one step (ms)")
    for column in ("phase", "trials", "median", "p90", "max", f"within {BOUND_S * 1000:.0f} ms"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, taken in results.items():
        milliseconds = sorted(1000 * seconds for seconds in taken)
        figures = (statistics.median(milliseconds), milliseconds[int(0.9 * (len(taken) - 1))], milliseconds[-1])
        within = sum(seconds <= BOUND_S for seconds in taken)
        table.add_row(phase, str(len(taken)), *(f"{figure:.0f}" for figure in figures), str(within))
    Console().print(table)
    if any(seconds > BOUND_S for taken in results.values() for seconds in taken):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
