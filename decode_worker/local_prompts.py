"""Choices whose tokens are computed here: prompts that are routed here, demoted pulls, and preempted choices.

    waiting      has no blocks yet
    computing    has all the blocks that it needs; its tokens are computed in chunks, a part of each step

Without a cost model the oldest goes first, and each step computes what the token budget allows. With one:

- Who has given tokens before (preempted) goes first, then the prompt whose TTFT objective is due first. A prompt that
  cannot meet it any more goes behind those that can (engine/urgency.py).
- A chunk is as long as the running choices can afford: the step ends before the next token of any of them is due. At
  least every `STARVED_STEPS` steps a block is computed all the same: local prompts get on however busy the worker is.
- Beyond the saturation length a second prompt in a step would only make both later, so there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from decode_worker.config import DecodeConfig
from decode_worker.flight import Reached
from decode_worker.rows import chunk_row
from decode_worker.sequence import Choice, Request
from engine.batch import Row
from engine.block_pool import BlockPool
from engine.chunking import longest_chunk, next_chunk
from engine.sampling import MAX_CHOICES
from engine.slack_queue import SlackQueue
from engine.step_cost import StepCost, StepWork
from engine.urgency import LATE_TURN, Urgency, prompt_s, urgency

# While local prompts wait, at most so many steps in a row have no chunk of them, or of the late ones among them.
STARVED_STEPS = 8
# Puts due times of those who were preempted before all others.
PREEMPTED_S = 1e12

Chunks = list[tuple[Row, Choice]]


class LocalPrompts:
    """`queued_tokens` are to be computed and are not yet; `queued_s` is what they take by the cost model, or 0.0."""

    def __init__(self, pool: BlockPool, config: DecodeConfig, cost: StepCost | None) -> None:
        self._pool = pool
        self._config = config
        self._cost = cost
        self._waiting: SlackQueue[Choice] = SlackQueue()
        self.computing: list[Choice] = []
        self._urgency: dict[Choice, Urgency] = {}
        self._left_s: dict[Choice, float] = {}
        self._starved_steps = 0
        self._steps = 0
        self.queued_tokens = 0
        self.queued_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting) + len(self.computing)

    @property
    def is_anybody_waiting(self) -> bool:
        return len(self._waiting) > 0

    def add(self, choice: Choice, now: float) -> None:
        """A COMPUTING choice whose blocks are to be had yet."""
        choice.computed = 0
        self.queued_tokens += len(choice.token_ids)
        if self._cost is None:
            # The oldest first, whatever is asked.
            self._waiting.push(choice.owner, choice, now, choice.age[0] + choice.age[1] / MAX_CHOICES)
            return
        left_s = self._measure(choice, self._pool.lookup(choice.token_ids, choice.request.submit.salt))
        if choice.request.is_read:
            # Before all prompts, the oldest first.
            wish = Urgency(choice.age[0] + choice.age[1] / MAX_CHOICES, due_s=-math.inf)
            objective_s, late_after_s = wish.patient_until_s - PREEMPTED_S, math.inf
        else:
            wish = self._wish(choice.request, left_s)
            objective_s, late_after_s = wish.due_s, wish.late_after_s(left_s)
        self._urgency[choice] = wish
        self._waiting.push(
            choice.owner,
            choice,
            now,
            wish.patient_until_s,
            objective_s=objective_s,
            late_after_s=late_after_s,
        )

    def remove(self, choice: Choice) -> None:
        """The choice is computed, or not wanted any more."""
        if self._waiting.remove(choice.owner) is None:
            self.computing.remove(choice)
        self.queued_tokens -= len(choice.token_ids) - choice.computed
        self.queued_s -= self._left_s.pop(choice, 0.0)
        self._urgency.pop(choice, None)
        if not self:
            # Rounding does not add up over a worker's life.
            self.queued_s = 0.0

    def advance(self, choice: Choice, end: int) -> None:
        """The KV of the choice's first `end` tokens is written."""
        self.queued_tokens -= end - choice.computed
        choice.computed = end
        if self._cost is not None:
            self._measure(choice, end)

    def next(self, now: float) -> Choice | None:
        """Who of those that wait is to have blocks first."""
        return self._waiting.peek(now, is_late_turn=self._is_late_turn)

    def admit(self, may_have: Callable[[Choice, int], bool], now: float) -> None:
        """Gives blocks to those that wait, in order, all that each needs at once. `may_have` says whether a choice may
        have blocks for so many tokens."""
        while (choice := self.next(now)) is not None:
            cached = self._pool.new(choice.owner, choice.token_ids, choice.request.submit.salt)
            missing = len(choice.token_ids) - cached
            if not may_have(choice, missing) or self._pool.append(choice.owner, missing) is None:
                self._pool.free(choice.owner)
                return
            self._waiting.pop(now, is_late_turn=self._is_late_turn)
            self.advance(choice, cached)
            if not choice.request.times.is_prompt_started:
                choice.request.cached_tokens = cached
                self._pool.counts.looked_up(len(choice.token_ids), cached)
            self.computing.append(choice)

    def chunks(self, reached: Mapping[Choice, Reached], decode: StepWork, limit_s: float, now: float) -> Chunks:
        """Rows for the next step beside `decode`; with these it should take at most `limit_s`."""
        if not self.computing:
            return []
        self._steps += 1
        budget = self._config.local_token_budget
        chunks: Chunks = []
        work = decode
        for choice in self._in_order(now):
            start = reached[choice].end if choice in reached else choice.computed
            if start == len(choice.token_ids):
                continue
            if chunks and self._cost is not None:
                budget = min(budget, self._cost.saturation_tokens - work.prompt_tokens)
            count = next_chunk(start, len(choice.token_ids), budget, self._pool.block_size)
            count = self._affordable(work, start, count, limit_s)
            # What is left is less than a block: a chunk that ended inside one would leave an odd rest.
            is_sliver = start + count < len(choice.token_ids) and (start + count) % self._pool.block_size > 0
            if not count or (chunks and self._cost is not None and is_sliver):
                break
            chunks.append((chunk_row(choice, self._pool.table(choice.owner), start, count), choice))
            budget -= count
            work = _with_chunk(work, start, count)
        self._starved_steps = 0 if chunks else self._starved_steps + 1
        return chunks

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _in_order(self, now: float) -> list[Choice]:
        if self._cost is None or len(self.computing) == 1:
            return self.computing
        return sorted(self.computing, key=lambda choice: (*self._rank(choice, now), choice.age))

    def _rank(self, choice: Choice, now: float) -> tuple[int, float]:
        wish = self._urgency[choice]
        if wish.due_s == -math.inf:
            return -1, wish.patient_until_s
        return wish.rank(self._left_s[choice], now, self._is_late_turn)

    @property
    def _is_late_turn(self) -> bool:
        return self._steps % LATE_TURN == 0

    @staticmethod
    def _wish(request: Request, left_s: float) -> Urgency:
        arrived_s, due_s = request.times.arrived_s, request.submit.ttft_due_s
        due_s = None if due_s is None else arrived_s + due_s
        return urgency(arrived_s, due_s, request.deadline_s, left_s, is_predicted=True)

    def _measure(self, choice: Choice, computed: int) -> float:
        left_s = prompt_s(self._cost, len(choice.token_ids) - computed, computed)
        self.queued_s += left_s - self._left_s.get(choice, 0.0)
        self._left_s[choice] = left_s
        return left_s

    def _affordable(self, work: StepWork, start: int, count: int, limit_s: float) -> int:
        """At most `count` tokens, as many as keep a step with `work` within `limit_s`."""
        cost = self._cost
        if cost is None:
            return count
        size = self._pool.block_size
        afforded = longest_chunk(start, count, size, lambda n: cost.step_s(_with_chunk(work, start, n)) <= limit_s)
        if not afforded and not work.prompts and self._starved_steps >= STARVED_STEPS:
            return min(count, size - start % size)
        return afforded


def _with_chunk(work: StepWork, start: int, count: int) -> StepWork:
    return StepWork((*work.prompts, (count, start)), work.decode_rows, work.decode_context)
