"""Small pieces for worker tests: an emulated runner, calls and submits, and a worker's loop in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from decode_worker.stream import Submit
from engine.batch import Batch, KVLayout
from engine.emulated_runner import EmulatedRunner
from engine.sampling import SamplingParams
from kvtransfer.transport import PrefillCall

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def layout(num_blocks: int = 16, block_size: int = 4, num_layers: int = 4, model: str = "m") -> KVLayout:
    return KVLayout(model, num_layers, 1, 1, "uint64", block_size, num_blocks)


def cost(batch: Batch) -> float:
    """10 ms a step and 1 ms a token, in virtual seconds."""
    return 0.01 + 0.001 * batch.token_count


def runner(num_blocks: int = 16, block_size: int = 4) -> EmulatedRunner:
    return EmulatedRunner(layout(num_blocks, block_size), cost, layer_group=2)


def call(tokens: int | Sequence[int], request_id: str = "r", **fields: Any) -> PrefillCall:
    token_ids = tuple(range(tokens)) if isinstance(tokens, int) else tuple(tokens)
    return PrefillCall(
        request_id, token_ids, **{"params": GREEDY, "seed": 0, "have_tokens": 0, "layout": layout(), **fields}
    )


def submit(tokens: int | Sequence[int], request_id: str = "r", **fields: Any) -> Submit:
    token_ids = tuple(range(tokens)) if isinstance(tokens, int) else tuple(tokens)
    return Submit(request_id, token_ids, **{"params": GREEDY, "seed": 0, **fields})


@asynccontextmanager
async def running(*loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs worker loops beside the body; a loop's crash is the body's failure."""
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(error, asyncio.CancelledError):
                raise AssertionError("a worker's loop ended by itself") from error
