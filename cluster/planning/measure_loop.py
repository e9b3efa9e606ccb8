"""What a decode worker's own loop takes per step, around the forward pass: the real worker over a runner that computes
nothing, by the processor time of its thread.

Scheduling, building the batch, booking the tokens, one frame per step. The wire to the gateway is not in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import cast

from decode_worker.config import DecodeConfig
from decode_worker.stream import Command, Done, Submit, TokenFrame
from decode_worker.worker import DecodeWorker
from engine.batch import Batch, KVLayout, LayerListener, Sampled, StepOutput
from engine.request_checks import LARGEST_VOCABULARY
from engine.sampling import SamplingParams
from kvtransfer.frames import Frame
from kvtransfer.transport import PrefillCall

BLOCK_SIZE = 16
PROMPT_TOKENS = 16
# Steps that are timed, after so many that are not; and the batches whose times say what a step and a row cost.
STEPS, WARM_UP_STEPS = 150, 20
FEW_ROWS, MANY_ROWS = 1, 32


class _IdleRunner:
    """Implements engine.batch.Runner: every token is 1, at once."""

    vocab_size = LARGEST_VOCABULARY
    can_guide = False

    def __init__(self, rows: int) -> None:
        blocks = rows * (-(-(PROMPT_TOKENS + STEPS + WARM_UP_STEPS) // BLOCK_SIZE) + 2)
        self.layout = KVLayout("idle", 1, 1, 2, "float32", BLOCK_SIZE, blocks)

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        # As every runner does, it lets others run.
        await asyncio.sleep(0)
        if on_layers is not None:
            on_layers(0, 1)
        return StepOutput(tuple(() if row.sample is None else (Sampled(1),) for row in batch.rows))

    def export_blocks(self, block_ids: Sequence[int], layers: range, block_tokens: int) -> bytes:
        raise AssertionError("local prompts are sent to nobody")

    def import_blocks(
        self,
        block_ids: Sequence[int],
        first_slot: int,
        layers: range,
        block_tokens: int,
        payload: memoryview,
        dtype: str,
    ) -> None:
        raise AssertionError("local prompts come from nobody")

    async def close(self) -> None:
        """Nothing to end."""


class _NoTransport:
    """Implements kvtransfer.transport.PrefillTransport for requests that need none."""

    def open(self, address: str, call: PrefillCall) -> AbstractAsyncContextManager[AsyncIterator[Frame]]:
        raise AssertionError(f"a local prompt was to be pulled from {address}")

    async def close(self) -> None:
        """Nothing to end."""


async def measure_loop() -> tuple[float, float]:
    """(seconds per step, seconds per row of a step) of a worker's loop."""
    few_s, many_s = await _step_s(FEW_ROWS), await _step_s(MANY_ROWS)
    row_s = max(0.0, (many_s - few_s) / (MANY_ROWS - FEW_ROWS))
    return max(0.0, few_s - FEW_ROWS * row_s), row_s


async def _step_s(rows: int) -> float:
    config = DecodeConfig(max_batch=rows, local_token_budget=rows * PROMPT_TOKENS, schedule_ahead=False)
    worker = DecodeWorker(
        _IdleRunner(rows),
        config,
        _NoTransport(),
        worker_id="loop",
        eos_token_ids=frozenset(),
        max_context=1 << 20,
        prefix_cache=False,
    )
    loop = asyncio.create_task(worker.run())
    started: list[tuple[int, float]] = []
    unfinished = rows
    try:
        async with aclosing(cast(AsyncGenerator[TokenFrame, None], worker.attach(_commands(rows)))) as frames:
            async for frame in frames:
                if frame.step >= WARM_UP_STEPS and not started:
                    started.append((frame.step, time.thread_time()))
                unfinished -= sum(isinstance(event, Done) for event in frame.events)
                if not unfinished:
                    step, began_s = started[0]
                    return (time.thread_time() - began_s) / (frame.step - step)
    finally:
        loop.cancel()
        await asyncio.wait([loop])
    raise AssertionError("the worker's stream ended before its requests did")


async def _commands(rows: int) -> AsyncIterator[Command]:
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + WARM_UP_STEPS, ignore_eos=True)
    for row in range(rows):
        # No two prompts alike, or one would wait for the other's prefix.
        yield Submit(str(row), tuple(row + 2 for _ in range(PROMPT_TOKENS)), params, seed=row)
    await asyncio.Event().wait()
