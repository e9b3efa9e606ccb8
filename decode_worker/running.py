"""The choices that get a token at every step: who is in the next batch, and where its token is to go.

Each has slots up to the end of its last block, so the pool is asked once per block. When there is none left, the
youngest choice gives its blocks back and is recomputed later (preemption by recompute).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from operator import attrgetter

from decode_worker.ahead import going_on, most_blocks
from decode_worker.config import DecodeConfig
from decode_worker.flight import Reached
from decode_worker.local_prompts import LocalPrompts
from decode_worker.rows import decode_row
from decode_worker.selection import Selection, select
from decode_worker.sequence import Choice, ChoiceState
from engine.batch import Row
from engine.block_pool import BlockPool
from engine.step_cost import StepCost

# What copy-on-write owes before a batch.
Copies = list[tuple[int, int]]
AGE = attrgetter("age")


class Running:
    """Choices in state RUNNING, the oldest first. Who is preempted goes to `local`."""

    def __init__(self, pool: BlockPool, config: DecodeConfig, cost: StepCost | None, local: LocalPrompts) -> None:
        self._pool = pool
        self._config = config
        self._cost = cost
        self._local = local
        self._choices: list[Choice] = []

    def __len__(self) -> int:
        return len(self._choices)

    def add(self, choice: Choice) -> None:
        choice.move(ChoiceState.RUNNING)
        choice.reserved = self._pool.reserved(choice.owner)
        choice.block_ids = self._pool.table(choice.owner)
        insort(self._choices, choice, key=AGE)

    def remove(self, choice: Choice) -> None:
        self._choices.remove(choice)

    def decode_rows(self, copies: Copies, now: float) -> tuple[Selection, list[Row]]:
        """Rows of those running choices that are in the next step, each with a slot for its token."""
        while True:
            selection = select(self._choices, self._cost, self._config.max_batch, now)
            running_count = len(self._choices)
            for choice in selection.choices:
                while choice.state is ChoiceState.RUNNING and not self._grow(choice, len(choice.token_ids), copies):
                    # The youngest gives way.
                    self._preempt(self._choices[-1], copies, now)
            if running_count == len(self._choices):
                return selection, [decode_row(choice, None) for choice in selection.choices]

    def rows_ahead(
        self, reached: Mapping[Choice, Reached], copies: Copies, now: float
    ) -> tuple[Selection, list[Row]] | None:
        choices = going_on(self._choices, self._local.computing, reached)
        if choices is None:
            return None
        selection = select(choices, self._cost, self._config.max_batch, now, drawing=reached)
        if most_blocks(selection.choices, reached, self._pool.block_size) > self._pool.available_count:
            return None
        rows: list[Row] = []
        for choice in selection.choices:
            after = reached.get(choice)
            if choice.state is ChoiceState.COMPUTING:
                # The step under way computes the last chunk of its prompt.
                choice.reserved, choice.block_ids = self._pool.reserved(choice.owner), self._pool.table(choice.owner)
            has_slot = self._grow(choice, len(choice.token_ids) + (after is not None), copies)
            assert has_slot, f"{choice.owner} takes a block more than was reckoned with"
            rows.append(decode_row(choice, after))
        return selection, rows

    def _grow(self, choice: Choice, tokens: int, copies: Copies) -> bool:
        """Slots for `tokens` tokens, and for as many more as fit into the last block. False when there is no block."""
        if tokens <= choice.reserved:
            return True
        room = self._pool.block_size - choice.reserved % self._pool.block_size
        appended = self._pool.append(choice.owner, room)
        if appended is None:
            return False
        copies += appended.copies
        choice.reserved += room
        choice.block_ids = self._pool.table(choice.owner)
        return True

    def _preempt(self, choice: Choice, copies: Copies, now: float) -> None:
        self._choices.remove(choice)
        lost = set(choice.block_ids)
        copies[:] = [copy for copy in copies if copy[1] not in lost]
        self._pool.free(choice.owner)
        choice.move(ChoiceState.COMPUTING)
        choice.request.preemptions += 1
        self._pool.counts.preemptions += 1
        self._local.add(choice, now)
