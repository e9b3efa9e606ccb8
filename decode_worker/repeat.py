"""Several decode steps in one go: how many, through which blocks, and how they are booked.

    schedule ── repeat ────────▶ run_many     the blocks that later steps would take are only looked up
    message that changes the next batch ─▶ cut_short         the step that runs now is the last
    message that takes blocks ──────────▶ cut_short, settle  those of the run are taken first
    complete ── book                                         all tokens and blocks at once

The pool changes as it would step by step: blocks are taken, and named, in the order in which single steps would have
done it, and before anybody else could notice. So its books, and with them who gets which block and what the prefix
cache forgets, are the same. But for one thing: `settle` comes before the run's tokens are known, so a block that became
full by then is named after blocks are taken, not before. That shows where a block of the same name is evicted by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from decode_worker.flight import DecodeBatch
from decode_worker.sequence import Choice
from engine.batch import Batch, Row, Sampled, StepOutput
from engine.block_pool import BlockPool
from engine.step_cost import StepCost, StepWork


@dataclass(frozen=True, slots=True)
class Repeat:
    """`batch` with tables that are long enough for `max_steps` steps. `takes`: (step, index of the choice) for each
    block that a later step needs, in the order in which they are taken; their ids are `block_ids`."""

    batch: Batch
    max_steps: int
    takes: tuple[tuple[int, int], ...] = ()
    block_ids: tuple[int, ...] = ()


def plan(pool: BlockPool, batch: DecodeBatch, max_steps: int, cost: StepCost | None) -> Repeat | None:
    """How often a batch of nothing but decode rows can be repeated, None when it cannot. Changes nothing."""
    choices = batch.choices
    steps = max_steps
    for choice in choices:
        if not choice.can_repeat:
            return None
        steps = min(steps, choice.max_length - len(choice.token_ids))
    steps = _steady_steps(batch, steps, cost)
    if steps <= 1:
        return None
    size = pool.block_size
    takes = [
        (step, index)
        for index, choice in enumerate(choices)
        for step in range(choice.reserved - len(choice.token_ids) + 1, steps, size)
    ]
    takes.sort()
    if len(takes) > pool.available_count:
        # The first step for which there is no block would preempt somebody.
        steps = takes[pool.available_count][0]
        takes = [take for take in takes if take[0] < steps]
    if steps <= 1:
        return None
    block_ids = pool.next_blocks(len(takes))
    return Repeat(_with_blocks(batch.batch, takes, block_ids), steps, tuple(takes), block_ids)


def settle(pool: BlockPool, batch: DecodeBatch, repeat: Repeat, steps: int) -> None:
    """Takes the blocks of the first `steps` steps."""
    assert 1 <= steps <= repeat.max_steps, f"{steps} steps were run of at most {repeat.max_steps}"
    for (step, index), block_id in zip(repeat.takes, repeat.block_ids, strict=True):
        if step >= steps:
            break
        _take(pool, batch.choices[index], block_id)


def book_blocks(pool: BlockPool, batch: DecodeBatch, repeat: Repeat | None, steps: int, ends: Sequence[int]) -> None:
    """After a run of so many steps: names the blocks that became full, up to token `ends[i]` of choice i, and takes
    those that the run has used, each at its step. `repeat` is None when `settle` has taken them before."""
    size = pool.block_size
    events: list[tuple[int, bool, int, int]] = []  # step before which it was, whether a block was taken, index, detail
    for index, (row, end) in enumerate(zip(batch.batch.rows, ends, strict=True)):
        first = (row.start // size + 1) * size
        events += [(filled - row.start, False, index, filled) for filled in range(first, end + 1, size)]
    if repeat is not None:
        takes = zip(repeat.takes, repeat.block_ids, strict=True)
        events += [(step, True, index, block_id) for (step, index), block_id in takes if step < steps]
    for _, is_take, index, detail in sorted(events):
        choice = batch.choices[index]
        if is_take:
            _take(pool, choice, detail)
        else:
            pool.seal(choice.owner, choice.token_ids, detail)


def _take(pool: BlockPool, choice: Choice, block_id: int) -> None:
    taken = pool.append_block(choice.owner)
    assert taken == block_id, f"somebody took block {block_id}, which a run writes"
    choice.reserved += pool.block_size
    choice.block_ids = (*choice.block_ids, block_id)


def drawn_by_row(outs: Sequence[StepOutput]) -> list[tuple[Sampled, ...]]:
    """What each row drew, step by step, from the outputs of a run."""
    columns = zip(*(out.sampled for out in outs), strict=True)
    return [tuple(chain.from_iterable(column)) for column in columns]


def mean_work(work: StepWork, steps: int) -> StepWork:
    """What each of so many steps took on average: each reads a token more per row than the one before."""
    if steps == 1:
        return work
    return StepWork(work.prompts, work.decode_rows, work.decode_context + work.decode_rows * (steps - 1) // 2)


def _steady_steps(batch: DecodeBatch, steps: int, cost: StepCost | None) -> int:
    """At most `steps`, so many that no later step would be made up otherwise because of how long it takes."""
    if cost is None or batch.steady_s == float("inf"):
        return steps
    rows, context = batch.work.decode_rows, batch.work.decode_context
    while steps > 1 and cost.step_s(StepWork((), rows, context + rows * (steps - 1))) > batch.steady_s:
        steps //= 2
    return steps


def _with_blocks(batch: Batch, takes: Sequence[tuple[int, int]], block_ids: Sequence[int]) -> Batch:
    if not takes:
        return batch
    rows = list(batch.rows)
    more: dict[int, list[int]] = {}
    for (_, index), block_id in zip(takes, block_ids, strict=True):
        more.setdefault(index, []).append(block_id)
    for index, ids in more.items():
        row = rows[index]
        rows[index] = Row(row.seq_id, row.token_ids, row.start, (*row.block_ids, *ids), row.sample)
    return Batch(tuple(rows), batch.copies)
