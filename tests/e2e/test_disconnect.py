"""A client's disconnect frees everything within one step (two of a decode worker that schedules ahead) and 250 ms, in
every phase: real gRPC on every hop, emulated forward passes. `python -m bench.disconnect` does the same with the
real model and more trials, and judges every one of them."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable

import pytest

from bench.disconnect import BOUND_S, PHASES, Arguments, Model, Stage, TimedRunner, decode, mid_transfer, run_phase
from cluster.messages import ModelInfo
from engine.batch import Batch, KVLayout
from engine.emulated_runner import EmulatedRunner

# Many layers, so that KV is large for its tokens and takes its time on a slow link.
LAYOUT = KVLayout("m", 64, 1, 1, "uint64", 16, 512)
# What is freed by a deadline or a lease is so after ten seconds; what only a busy machine delays is by then long free.
LATE_S = 5.0
MODEL = Model(ModelInfo("m", 50_000, 4096, "llama", "uint64", (0,), False), None)


@pytest.mark.parametrize(
    ("phase", "ahead"),
    [*((phase, False) for phase in PHASES), (decode, True)],
    ids=lambda value: getattr(value, "__name__", "ahead" if value else "step by step"),
)
async def test_disconnect(phase: Callable[[Stage], Awaitable[float]], ahead: bool) -> None:
    def cost(batch: Batch) -> float:
        # For the middle of a transfer prefill must be faster than the link, for all else slow enough to be met.
        return 0.002 if phase is mid_transfer and batch.token_count > 1 else 0.03

    runners = tuple(TimedRunner(EmulatedRunner(LAYOUT, cost, 16, vocab_size=50_000)) for _ in range(2))
    taken = await run_phase(
        phase, (runners[0], runners[1]), MODEL, Arguments(trials=8, prompt_tokens=1024, schedule_ahead=ahead)
    )
    assert statistics.median(taken) <= BOUND_S
    assert max(taken) <= LATE_S
