"""The Runner that computes: torch, on CPU or GPU, in one dedicated thread.

    event loop    run ──────────────── on_layers ─ on_layers ─ … ─ returns    (export, import of other blocks meanwhile)
                   │                       ▲           ▲              ▲
    the thread     └ copies │ layer group ─┘ │ group ──┘ │ … │ sample ┘ copies │ layer group …    (the next run)

A second run may be asked for while one is under way. It waits in the thread's queue, so it begins the moment the first
has drawn its tokens, whatever the event loop is busy with; tokens that it follows are read from the draws just made.

A run that is cancelled still waits for the thread: `run` never lets go while a forward pass may read or write blocks,
so whoever awaited all runs can free their blocks at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from engine.batch import Batch, LayerListener, Row, StepOutput
from engine.cached_runner import CachedRunner, on_loop
from engine.forward import Forward
from engine.forward_graphs import GraphedForward
from engine.kv_cache import KVCache
from engine.model import Model
from engine.sampler import Sampler
from engine.step_inputs import StepInputs, pack_step
from kernels.capture import Capture


class TorchRunner(CachedRunner):
    """See `Runner` in engine/batch.py for the contract.

    `layer_group`: layers between two calls of `on_layers`. `bind` is called once in the thread, before any pass: it may
    say how many CPU threads compute, and where. `capture` records decode steps of up to `recorded_rows` rows.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        sampler: Sampler,
        *,
        device: torch.device,
        layer_group: int,
        bind: Callable[[], None] | None = None,
        capture: Capture | None = None,
        recorded_rows: int = 0,
    ) -> None:
        plain = Forward(model, cache.tensor, layer_group)
        self._forward = GraphedForward(plain, capture, range(1, recorded_rows + 1)) if capture else plain
        super().__init__(cache, model.vocab_size)
        self._sampler = sampler
        self._device = device
        # What the batch before drew, in the order that `Row.follows` counts in. Only the thread touches it.
        self._drawn: list[int] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forward", initializer=bind)

    @property
    def can_guide(self) -> bool:
        return self._sampler.can_guide

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        """See Runner. When cancelled, waits for the pass to end and only then raises CancelledError. A pass that has
        not begun is called off."""
        return await wait_out(self._thread.submit(self.run_now, batch, on_loop(on_layers)))

    def run_now(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        """The forward pass itself, in the calling thread, which also makes the calls of `on_layers`."""
        with torch.inference_mode():
            try:
                logits = self.logits(batch, on_layers)
                drawn = self._sampler.sample(logits, [row.sample for row in batch.rows if row.sample is not None])
            except BaseException:
                # Or the next batch would follow what an older one drew.
                self._drawn = []
                raise
            self._drawn = [sampled.token_id for row in drawn for sampled in row]
            each = iter(drawn)
            return StepOutput(tuple(() if row.sample is None else next(each) for row in batch.rows))

    def logits(self, batch: Batch, on_layers: LayerListener | None = None) -> torch.Tensor:
        """Runs the model; [rows that sample, vocab] float32, at each such row's last token."""
        with torch.inference_mode():
            return self._logits(batch, on_layers or _nobody)

    async def close(self) -> None:
        """Waits for a forward pass under way, then ends the thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, _nothing)
        self._thread.shutdown()

    def _logits(self, batch: Batch, on_layers: Callable[[int, int], None]) -> torch.Tensor:
        self._cache.copy_blocks(batch.copies)
        shape = self._forward.shape_of(batch.rows)
        inputs = pack_step(batch.rows, self.layout.block_size, shape, self.vocab_size).on(self._device)
        self._follow(batch.rows, inputs)

        def after_group(first: int, end: int) -> None:
            if self._device.type == "cuda":
                # Launches run ahead of the device: the listener must find KV in the cache, not on its way there.
                torch.cuda.current_stream(self._device).synchronize()
            on_layers(first, end)

        return self._forward.run(inputs, after_group).float()

    def _follow(self, rows: Sequence[Row], inputs: StepInputs) -> None:
        """Puts the tokens in that the batch before has drawn."""
        for row, span in zip(rows, inputs.attention.spans, strict=False):
            if row.follows is not None:
                inputs.token_ids[span.query_start] = self._drawn[row.follows]


async def wait_out(*steps: Future[Any]) -> StepOutput:
    """The first one's result. When cancelled, calls off what has not begun and waits for the rest, and only then raises
    CancelledError: as long as a pass may read or write blocks, nobody else may have them."""
    waiting = [asyncio.wrap_future(step) for step in steps]
    cancelled = False
    # Callbacks are queued on the loop in order, so every on_layers comes before the future's own completion.
    while not all(step.done() for step in waiting):
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError:
            cancelled = True
            for step in steps:
                step.cancel()
    for ended in waiting:
        if not ended.cancelled():
            # Taken note of even where nobody wants it, or asyncio would complain.
            ended.exception()
    if cancelled:
        raise asyncio.CancelledError
    result: StepOutput = waiting[0].result()
    return result


def _nobody(first: int, end: int) -> None:
    """The listener of a caller that does not listen."""


def _nothing() -> None:
    """Queued behind a forward pass, its end is the pass's end."""
