"""How many tokens of a prompt to compute in one step."""

from __future__ import annotations

from collections.abc import Callable


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


def longest_chunk(start: int, count: int, block_size: int, is_short_enough: Callable[[int], bool]) -> int:
    """The longest part of a chunk of `count` tokens from `start` on that is short enough: all of it, or one that ends
    on a block boundary; 0 when not even the first block is. A part of a chunk that is short enough must be so too."""
    if count <= 0 or is_short_enough(count):
        return max(0, count)
    first = block_size - start % block_size
    if first >= count or not is_short_enough(first):
        return 0
    good, bad = 0, -(-(count - first) // block_size)
    while bad - good > 1:
        middle = (good + bad) // 2
        if is_short_enough(first + middle * block_size):
            good = middle
        else:
            bad = middle
    return first + good * block_size
