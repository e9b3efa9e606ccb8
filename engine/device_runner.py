"""The Runner of a GPU: the host only launches, two threads share the work, and neither waits for the other's step.

    event loop    run N ─────────────── run N+1 ─── on_layers ─ on_layers ─ N returns      (export, import meanwhile)
                   │                     │             ▲            ▲            ▲
    launcher       └ pack, launch N      └ pack, launch N+1          │            │
    device           ├ group ┤ group ┤ draw ┤ group ┤ group ┤ draw   │            │
    finisher                 └ event ┘──────┴ event ─────────────────┴── tokens ──┘

Drawn tokens stay on the device: a row of step N+1 that follows step N gets its token there, and the host reads it
later, from pinned memory, when the event says that it has arrived. A layer group is announced when its event has
happened, so whoever exports it finds it in the cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.batch import Batch, LayerListener, Row, StepOutput
from engine.cached_runner import CachedRunner, on_loop
from engine.forward import Forward
from engine.forward_graphs import GraphedForward
from engine.kv_cache import KVCache
from engine.step_inputs import StepInputs, pack_step
from engine.torch_runner import wait_out

if TYPE_CHECKING:
    # Triton need not be installed where this runner is only named.
    from engine.device_sampler import DeviceSampler, Drawn


@dataclass(frozen=True, slots=True, eq=False)
class _Launched:
    """A step on its way. `groups`: first and end layer, and the event that says they are done (None where the device
    does everything at once)."""

    groups: tuple[tuple[int, int, torch.cuda.Event | None], ...]
    drawn: Drawn
    samples: tuple[bool, ...]  # for each row, whether it draws


class DeviceRunner(CachedRunner):
    """See `Runner` in engine/batch.py for the contract. On a CPU it needs Triton's interpreter, and is for tests."""

    def __init__(
        self, forward: Forward | GraphedForward, cache: KVCache, sampler: DeviceSampler, *, device: torch.device
    ) -> None:
        self._forward = forward
        super().__init__(cache, sampler.vocab_size)
        self._sampler = sampler
        self._device = device
        # Draws of the batch before, still on the device. Only the launcher touches it.
        self._drawn: torch.Tensor | None = None
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="launch", initializer=self._own_stream)
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="finish")

    @property
    def can_guide(self) -> bool:
        return self._sampler.can_guide

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        """When cancelled, waits for the step to end and only then raises CancelledError."""
        launched = self._launcher.submit(self._launch, batch)
        # The finisher takes steps in the order of the calls, as the launcher does, so it never waits for a later one.
        return await wait_out(self._finisher.submit(self._finish, launched, on_loop(on_layers)), launched)

    async def close(self) -> None:
        """Waits for steps under way, then ends both threads."""
        loop = asyncio.get_running_loop()
        for thread in (self._launcher, self._finisher):
            await loop.run_in_executor(thread, _nothing)
            thread.shutdown()

    # ── the launcher's thread ────────────────────────────────────────────────────────────────────────────────────────

    def _own_stream(self) -> None:
        """Not the default stream: others' work there would be waited for, and graphs cannot be captured on it."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def _launch(self, batch: Batch) -> _Launched:
        with torch.inference_mode():
            try:
                return self._launch_step(batch)
            except BaseException:
                # Or the next batch would follow what an older one drew.
                self._drawn = None
                raise

    def _launch_step(self, batch: Batch) -> _Launched:
        self._cache.copy_blocks(batch.copies)
        rows = batch.rows
        shape = self._forward.shape_of(rows)
        pinned = self._device.type == "cuda"
        inputs = pack_step(rows, self.layout.block_size, shape, self._forward.vocab_size, pinned).on(self._device)
        self._follow(rows, inputs)
        specs = [row.sample for row in rows if row.sample is not None]
        prepared = self._sampler.prepare(specs)
        groups: list[tuple[int, int, torch.cuda.Event | None]] = []
        logits = self._forward.run(inputs, lambda first, end: groups.append((first, end, self._mark())))
        drawn = self._sampler.launch(logits[: len(specs)].float(), prepared)
        self._drawn = drawn.token_ids
        return _Launched(tuple(groups), drawn, tuple(row.sample is not None for row in rows))

    def _follow(self, rows: Sequence[Row], inputs: StepInputs) -> None:
        """Puts tokens in that only the device knows yet."""
        starts = [span.query_start for span in inputs.attention.spans]
        pairs = [(start, row.follows) for start, row in zip(starts, rows, strict=False) if row.follows is not None]
        if not pairs:
            return
        if self._drawn is None:
            raise RuntimeError("the batch before has failed: there are no draws to follow")
        host = torch.tensor(pairs, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        places, draws = host.to(self._device, non_blocking=True).unbind(1)
        inputs.token_ids.index_copy_(0, places, self._drawn.index_select(0, draws))

    def _mark(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    # ── the finisher's thread ────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self, launched: Future[_Launched], publish: Callable[[int, int], None]) -> StepOutput:
        step = launched.result()
        for first, end, event in step.groups:
            if event is not None:
                event.synchronize()
            publish(first, end)
        each = iter(self._sampler.finish(step.drawn))
        return StepOutput(tuple(next(each) if draws else () for draws in step.samples))


def _nothing() -> None:
    """Queued behind a step, its end is the step's end."""
