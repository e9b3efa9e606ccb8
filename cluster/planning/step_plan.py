"""Which steps `tandem profile` measures: anchors of every kind to fit to, and others, drawn by chance, to judge by.

    decode        rows × context
    prompt        one chunk × context before it, and a few chunks of several prompts
    mixed         decode rows and a chunk in one step, what a colocated or local route makes

Contexts are drawn log-uniformly from what the pool can hold. Pure: the same `rng` gives the same plan.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from engine.step_cost import StepWork

# Powers of two and what lies between them: kernels change their ways within an octave.
ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
CHUNKS = (2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
MIXED_ROWS = (1, 4, 8, 16, 32, 64, 128, 256)
MIXED_CHUNKS = (2, 4, 8, 16, 32, 64, 128)
QUICK_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256)
QUICK_CHUNKS = (2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 2048)
QUICK_MIXED_ROWS = (1, 8, 32, 128)
QUICK_MIXED_CHUNKS = (2, 16, 64)
# Chunks beyond this part of the largest are measured at the beginning of a prompt alone, and so are those of --quick
# beyond that: they take the longest and say the least.
LONG_CHUNK, QUICK_LONG_CHUNK = 1 / 2, 1 / 8
# Steps to judge by, of each of the three kinds, and chunks of several prompts to fit to.
HELD_OUT, QUICK_HELD_OUT = 12, 6
SEVERAL, QUICK_SEVERAL = 6, 3
MOST_PROMPTS = 4
LEAST_CONTEXT = 16
# Part of the pool that a step may use: its last blocks are seldom full.
POOL_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest steps worth measuring: decode rows and prompt tokens of one step, tokens of one sequence, tokens of
    KV in the pool."""

    rows: int
    chunk: int
    context: int
    pool_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`anchors` are fitted to, `held_out` never are."""

    anchors: tuple[StepWork, ...]
    held_out: tuple[StepWork, ...]


def plan_steps(limits: Limits, rng: random.Random, is_quick: bool = False) -> StepPlan:
    """Every step fits the limits. A limit so small that nothing fits leaves a plan with fewer steps."""
    rows = [count for count in (QUICK_ROWS if is_quick else ROWS) if count <= limits.rows]
    chunks = [count for count in (QUICK_CHUNKS if is_quick else CHUNKS) if count <= limits.chunk]
    mixed_rows = [count for count in (QUICK_MIXED_ROWS if is_quick else MIXED_ROWS) if count <= limits.rows]
    mixed_chunks = [count for count in (QUICK_MIXED_CHUNKS if is_quick else MIXED_CHUNKS) if count <= limits.chunk]
    drawer = _Drawer(limits, rng)
    long_chunk = limits.chunk * (QUICK_LONG_CHUNK if is_quick else LONG_CHUNK)
    anchors: list[StepWork] = []
    for count in rows:
        # The least context and the largest: the slope is known best from its ends.
        anchors += [drawer.decode(count, share) for share in (0.0, 1.0)] + [drawer.decode(count)]
    for new in chunks:
        anchors += [StepWork(((new, 0),))] + ([drawer.prompt(new)] if new <= long_chunk else [])
    anchors += [drawer.prompt(new, 1.0) for new in chunks[::2] if new <= long_chunk / 2]
    anchors += [drawer.mixed(count, new) for count in mixed_rows for new in mixed_chunks]
    anchors += [drawer.several() for _ in range(QUICK_SEVERAL if is_quick else SEVERAL)]
    held_out: list[StepWork] = []
    for _ in range(QUICK_HELD_OUT if is_quick else HELD_OUT):
        held_out.append(drawer.decode(drawer.count(1, limits.rows)))
        held_out.append(drawer.prompt(drawer.count(2, round(long_chunk))))
        held_out.append(drawer.mixed(drawer.count(1, limits.rows), drawer.count(2, round(long_chunk / 2))))
    kept = dict.fromkeys(filter(drawer.fits, anchors))
    return StepPlan(
        tuple(kept), tuple(work for work in dict.fromkeys(held_out) if drawer.fits(work) and work not in kept)
    )


class _Drawer:
    def __init__(self, limits: Limits, rng: random.Random) -> None:
        self._limits, self._rng = limits, rng
        self._pool_tokens = int(limits.pool_tokens * POOL_SHARE)

    def fits(self, work: StepWork) -> bool:
        """Whether the pool holds it, and no sequence is longer than the model's context."""
        sequences = [new + context for new, context in work.prompts]
        longest = max([*sequences, math.ceil(1.5 * work.decode_context / max(work.decode_rows, 1))])
        return sum(sequences) + work.decode_context <= self._pool_tokens and longest <= self._limits.context

    def count(self, low: int, high: int) -> int:
        """Log-uniform in [low, high]."""
        return int(low * float(max(high, low) / low) ** self._rng.random() + 0.5)

    def decode(self, rows: int, share: float | None = None) -> StepWork:
        """`share`: 0 for the least context, 1 for the largest, None for any."""
        return StepWork((), rows, rows * self._context(rows, 0, share))

    def prompt(self, new: int, share: float | None = None) -> StepWork:
        return StepWork(((new, self._context(1, new, share)),))

    def mixed(self, rows: int, new: int) -> StepWork:
        # Half of such chunks begin a prompt.
        context = self._context(rows + 1, new, None) if self._rng.random() < 0.5 else 0
        return StepWork(((new, context),), rows, rows * self._context(rows + 1, new, None))

    def several(self) -> StepWork:
        prompts = self._rng.randint(2, MOST_PROMPTS)
        chunks = [self.count(2, max(2, self._limits.chunk // 4 // prompts)) for _ in range(prompts)]
        return StepWork(tuple((new, self._rng.choice((0, LEAST_CONTEXT * new))) for new in chunks))

    def _context(self, rows: int, new: int, share: float | None) -> int:
        """Of each of `rows` sequences, one of which gets `new` tokens more."""
        # The longest row of a batch is half as long again as the mean.
        most = min((self._pool_tokens - new) // rows, int((self._limits.context - new) / 1.5))
        most = max(most, 1)
        least = min(LEAST_CONTEXT, most)
        return int(least * float(most / least) ** (self._rng.random() if share is None else share) + 0.5)
