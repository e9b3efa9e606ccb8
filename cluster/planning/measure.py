"""Times whole steps of the running device with the engine's own runner: what `tandem profile` fits a law to.

    StepWork ─▶ rows over scattered blocks ─▶ runner.run, as a worker's loop calls it ─▶ typical seconds

Steps come in an order that chance decides, round after round, so that a machine that slows down for a while spoils a
little of everything and not all of one kind. Loads torch: imported only where a worker really runs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal

import torch

from cluster.planning.step_fit import Measured
from engine.batch import Batch, KVLayout, Row, Runner, SampleSpec
from engine.engine import choose_device
from engine.kv_cache import DTYPES
from engine.sampling import SamplingParams
from engine.step_cost import StepWork

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
# Rounds over all steps. A step that has taken so long in all is not run again, once it has been run twice.
ROUNDS = 7
LEAST_ROUNDS = 2
ENOUGH_S = 1.5
# Contexts of decode rows lie between these parts of their mean: a real batch's rows are not alike.
SPREAD = (0.5, 1.5)

# Told how many steps have been timed, of how many.
Progress = Callable[[int, int], None]


class Measurement:
    """Runs steps on one runner whose pool nobody else uses. Block 0 holds what all other blocks are filled with."""

    def __init__(self, runner: Runner, vocab_size: int, rng: random.Random) -> None:
        self._runner, self._vocab_size, self._rng = runner, vocab_size, rng

    async def run(self, works: Sequence[StepWork], stop_at_s: float, progress: Progress) -> list[Measured]:
        """Each step's typical seconds, in the order of `works`; without those that there was no time for before
        `stop_at_s`, by time.perf_counter."""
        await self._fill()
        times: list[list[float]] = [[] for _ in works]
        for number in range(ROUNDS + 1):
            left = [i for i, taken in enumerate(times) if len(taken) <= LEAST_ROUNDS or sum(taken) < ENOUGH_S]
            self._rng.shuffle(left)
            await self._round(works, left, times, stop_at_s)
            progress(number, ROUNDS)
        # The first time counts for nothing where there are others: kernels are compiled, steps recorded.
        kept = [tuple(taken[1:] or taken) for taken in times]
        return [Measured(work, typical(taken), taken) for work, taken in zip(works, kept, strict=True) if taken]

    async def _round(
        self, works: Sequence[StepWork], order: Sequence[int], times: list[list[float]], stop_at_s: float
    ) -> None:
        for index in order:
            if time.perf_counter() > stop_at_s:
                return
            batch = batch_of(works[index], self._runner.layout, self._vocab_size, self._rng)
            began_s = time.perf_counter()
            await self._runner.run(batch)
            times[index].append(time.perf_counter() - began_s)

    async def _fill(self) -> None:
        """Values as keys and values have them: memory as it comes may hold NaN, or zeros that cost nothing."""
        layout = self._runner.layout
        shape = (layout.num_layers, 1, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        raw = torch.randn(shape).to(DTYPES[layout.dtype]).flatten().view(torch.uint8).numpy().data
        self._runner.import_blocks([0], 0, range(layout.num_layers), layout.block_size, raw, layout.dtype)
        copies = tuple((0, block) for block in range(1, layout.num_blocks))
        row = batch_of(StepWork((), 1, 1), layout, self._vocab_size, self._rng).rows
        await self._runner.run(Batch(row, copies))


def typical(seconds: Sequence[float]) -> float:
    """The median of the faster half: what else runs on a machine makes a step slower, and never faster."""
    ordered = sorted(seconds)
    return median(ordered[: -(-len(ordered) // 2)])


def batch_of(work: StepWork, layout: KVLayout, vocab_size: int, rng: random.Random) -> Batch:
    """A batch that is this work: decode rows, then prompts, as a decode worker has them. Every row draws one token, and
    has blocks of its own from all over the pool."""
    ends = _contexts(work.decode_rows, work.decode_context, rng)
    spans = [(end - 1, 1) for end in ends] + [(context, new) for new, context in work.prompts]
    size = layout.block_size
    counts = [-(-(start + count) // size) for start, count in spans]
    ids = rng.sample(range(layout.num_blocks), sum(counts))
    rows = []
    for number, ((start, count), blocks) in enumerate(zip(spans, counts, strict=True)):
        table, ids = ids[:blocks], ids[blocks:]
        tokens = [rng.randrange(vocab_size) for _ in range(count)]
        rows.append(Row(str(number), tokens, start, table, SampleSpec(GREEDY, 0, 0)))
    return Batch(tuple(rows))


def _contexts(rows: int, total: int, rng: random.Random) -> list[int]:
    """Unlike contexts of at least 1 that add up to about `total`, and to no more."""
    if not rows:
        return []
    parts = [rng.uniform(*SPREAD) for _ in range(rows)]
    return [max(1, int(total * part / sum(parts))) for part in parts]


def device_name(wanted: Literal["auto", "cpu", "cuda"]) -> str:
    """torch's name of the device that an engine with this configuration computes on; "cpu"."""
    device = choose_device(wanted)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
