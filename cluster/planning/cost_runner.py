"""A runner that computes nothing: it takes as long as a cost model says, and every token it answers is the same.

For capacity questions, where only time and memory count: nothing is stored, and KV payloads have a size but no bytes.
engine/emulated_runner.py is the one for tests of correctness.

A prompt's KV is handed out while its step runs, in layer groups, as a real runner does: the layout has PARTS equal
"layers" in place of the model's own, so that a chunk takes few frames.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.planning.emulation_spec import WorkerCost
from cluster.planning.long_run import LongRun
from engine.batch import Batch, KVLayout, LayerListener, Sampled, StepOutput
from engine.errors import ConfigError
from engine.request_checks import LARGEST_VOCABULARY
from engine.step_cost import StepCost, work_of

PARTS = 8
# After how many parts KV is published. The last one is what is still to be sent when the step ends: an eighth, about
# what the engine's groups of 5 layers leave of a model of 32.
PUBLISHED_AFTER = (4, 7, PARTS)
# Bytes of one element of the layout's dtype, and K and V.
_ELEMENT_BYTES, _K_AND_V = 2, 2

_SAMPLED = (Sampled(0),)

# A payload of any size is a slice of this: one byte in memory, repeated with stride 0.
_EMPTY = np.broadcast_to(np.zeros(1, np.uint8), 1 << 50).data


def cost_layout(model: str, cost: WorkerCost, block_size: int) -> KVLayout:
    """A layout that holds what the worker's memory holds, in PARTS layers. Bytes per token are rounded up to a
    multiple of 4 · PARTS. Raises ConfigError where the model leaves no memory for KV."""
    head_dim = -(-cost.kv_bytes(1) // (PARTS * _K_AND_V * _ELEMENT_BYTES))
    num_blocks = cost.kv_capacity_tokens // block_size
    if num_blocks < 1:
        raise ConfigError(f"model: {model} leaves memory for {cost.kv_capacity_tokens} tokens of KV on this device")
    return KVLayout(model, PARTS, 1, head_dim, "bfloat16", block_size, num_blocks)


@dataclass(frozen=True, slots=True)
class StepNoise:
    """How far real steps are from the cost model: measured ratios of actual over predicted seconds, drawn at random."""

    prefill: Sequence[float]
    decode: Sequence[float]
    rng: random.Random

    def __call__(self, *, has_prompt: bool) -> float:
        ratios = self.prefill if has_prompt else self.decode
        return self.rng.choice(ratios) if ratios else 1.0


class CostRunner:
    """Implements engine.multi_step.MultiStepRunner on the running loop's clock.

    `loop_s`: seconds that a worker's own loop adds to a step of so many rows, None for none.
    """

    def __init__(
        self,
        layout: KVLayout,
        cost: StepCost,
        noise: StepNoise | None = None,
        loop_s: Callable[[int], float] | None = None,
    ) -> None:
        self._layout = layout
        self._cost = cost
        self._noise = noise
        self._loop_s = loop_s
        self._free_at_s = 0.0
        self._long: LongRun | None = None

    vocab_size = LARGEST_VOCABULARY
    can_guide = False

    @property
    def layout(self) -> KVLayout:
        return self._layout

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        """See Runner. A batch handed in while another runs begins at that one's end."""
        begin_s, end_s = self._book(self._step_s(batch))
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        timers = [loop.call_at(end_s, _resolve, ended)]
        first = 0
        if on_layers is not None:
            for last in PUBLISHED_AFTER[:-1]:
                when_s = begin_s + (end_s - begin_s) * last / PARTS
                timers.append(loop.call_at(when_s, on_layers, first, last))
                first = last
        try:
            await ended
        finally:
            for timer in timers:
                timer.cancel()
        if on_layers is not None:
            on_layers(first, PARTS)
        return StepOutput(tuple(_SAMPLED * len(row.sample.choices) if row.sample else () for row in batch.rows))

    async def run_many(self, batch: Batch, max_steps: int) -> list[StepOutput]:
        """See MultiStepRunner."""
        assert self._long is None, "one long run at a time"
        loop = asyncio.get_running_loop()
        rows = len(batch.rows)
        context = sum(row.end for row in batch.rows)
        noise = None if self._noise is None else lambda: self._drawn(has_prompt=False)
        loop_s = 0.0 if self._loop_s is None else self._loop_s(rows)
        long = LongRun(loop, self._cost, rows, context, max_steps, loop_s, noise)
        self._long = long
        try:
            steps = await long.ended
        finally:
            long.stop()
            self._long = None
        self._free_at_s = loop.time()
        return [StepOutput((_SAMPLED,) * rows)] * steps

    def cut_short(self) -> int:
        """See MultiStepRunner."""
        assert self._long is not None, "there is no long run to cut short"
        return self._long.cut_short()

    def export_blocks(self, block_ids: Sequence[int], layers: range, block_tokens: int) -> memoryview:
        return _EMPTY[: len(layers) * len(block_ids) * block_tokens * self._layout.token_bytes]

    def import_blocks(
        self,
        block_ids: Sequence[int],
        first_slot: int,
        layers: range,
        block_tokens: int,
        payload: memoryview,
        dtype: str,
    ) -> None:
        """Takes what came; there is nothing in it."""

    async def close(self) -> None:
        assert self._long is None, "the runner was closed while a batch is under way"

    def _step_s(self, batch: Batch) -> float:
        work = work_of(batch)
        own_s = 0.0 if self._loop_s is None else self._loop_s(len(batch.rows))
        return self._cost.step_s(work) * self._drawn(has_prompt=bool(work.prompts)) + own_s

    def _drawn(self, *, has_prompt: bool) -> float:
        return 1.0 if self._noise is None else self._noise(has_prompt=has_prompt)

    def _book(self, step_s: float) -> tuple[float, float]:
        begin_s = max(asyncio.get_running_loop().time(), self._free_at_s)
        self._free_at_s = begin_s + step_s
        return begin_s, self._free_at_s


async def sleep_until(time_s: float) -> None:
    """Until `time_s` on the loop's clock, exactly: a sum of delays would be off by its roundings."""
    loop = asyncio.get_running_loop()
    due: asyncio.Future[None] = loop.create_future()
    timer = loop.call_at(time_s, _resolve, due)
    try:
        await due
    finally:
        timer.cancel()


def _resolve(due: asyncio.Future[None]) -> None:
    if not due.done():
        due.set_result(None)
