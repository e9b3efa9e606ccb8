"""How many tokens of a prompt to compute in one step."""

from __future__ import annotations


def next_chunk(start: int, end: int, budget: int, block_size: int) -> int:
    """Tokens of [start, end) to run now, at most `budget`; 0 when the budget is spent.

    A chunk that does not finish the prompt ends on a block boundary where it can, so that its blocks are complete and
    can be sent at once.
    """
    count = min(end - start, budget)
    if start + count < end:
        aligned = (start + count) // block_size * block_size - start
        count = aligned if aligned > 0 else count
    return max(0, count)
