"""The steps under way, at most two, and when the blocks of those who leave can go back.

    scheduled   1 ── 2 ── 3           every batch gets a number, in the order in which they run
    ended       1                     2 runs, 3 waits behind it
    leaving     a after 2, b after 3

A batch that is under way names blocks that it will still read and write. Whoever leaves may be named by any batch
scheduled so far, and by none after that: the blocks go back once the newest of these has ended.

A copy that copy-on-write owes is the one case in which a batch reads a block of somebody whom it does not name, and who
may have left before. So a batch with copies holds back everybody who is leaving when it is scheduled.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from decode_worker.sequence import Choice
from engine.batch import Batch
from engine.block_pool import BlockPool
from engine.step_cost import StepWork

# One step runs, one waits behind it.
MAX_UNDER_WAY = 2


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """What to run, and whose rows they are, in row order. The first `decode_rows` of them are of running choices.

    `work` is what the forward pass takes. While a step takes at most `steady_s`, the same choices are chosen again.
    """

    batch: Batch
    choices: tuple[Choice, ...]
    decode_rows: int
    work: StepWork
    steady_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Reached:
    """Where a step under way leaves a choice: KV of [0, end) is written, and the tokens that follow are the batch's
    draws number `draws`: none inside a prompt, several at the end of a prompt with n > 1."""

    end: int
    draws: range


class Flight:
    """Counts steps, and holds blocks back for them."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._under_way: deque[DecodeBatch] = deque()
        self._scheduled = 0
        self._ended = 0
        self._leaving: list[tuple[str, int]] = []  # table owners, and the step after which their blocks go back

    @property
    def is_under_way(self) -> bool:
        return bool(self._under_way)

    @property
    def is_anybody_leaving(self) -> bool:
        return bool(self._leaving)

    def launch(self, batch: DecodeBatch) -> None:
        self._under_way.append(batch)
        self._scheduled += 1
        if batch.batch.copies:
            self._leaving = [(owner, self._scheduled) for owner, _ in self._leaving]

    def land(self, batch: DecodeBatch) -> None:
        """The oldest step has ended."""
        oldest = self._under_way.popleft()
        assert oldest is batch, "a step was completed before an older one"
        self._ended += 1

    def leave(self, owner: str) -> None:
        """No batch will name `owner` any more; one that is under way may."""
        self._leaving.append((owner, self._scheduled))

    def release(self) -> None:
        """Gives back the blocks of those who have left and whom no step under way can name."""
        kept: list[tuple[str, int]] = []
        for owner, after in self._leaving:
            if after > self._ended:
                kept.append((owner, after))
            elif self._pool.owns(owner):
                self._pool.free(owner)
        self._leaving = kept

    def reached(self) -> dict[Choice, Reached]:
        """Where the one step under way leaves its choices; empty when there is none."""
        assert len(self._under_way) < MAX_UNDER_WAY, "nobody can follow two steps under way"
        reached: dict[Choice, Reached] = {}
        drawn = 0
        for step in self._under_way:
            for row, choice in zip(step.batch.rows, step.choices, strict=True):
                draws = range(drawn, drawn + (len(row.sample.choices) if row.sample is not None else 0))
                reached[choice] = Reached(row.end, draws)
                drawn = draws.stop
        return reached
