"""Whether a block pool's books agree: every block in one place, every reference explained, every name found."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True, slots=True)
class Held:
    """One owner's table: its blocks, the tokens reserved and written in them, and how many blocks have names."""

    owner: str
    block_ids: Sequence[int]
    reserved: int
    filled: int
    name_count: int


@dataclass(frozen=True, slots=True)
class Books:
    """A pool's books as they are: `refs` and `name_of` have one entry for each block."""

    block_size: int
    refs: Sequence[int]
    name_of: Sequence[bytes | None]
    block_named: Mapping[bytes, int]
    free: Collection[int]
    cached: Mapping[int, None]
    tables: Sequence[Held]

    def has_its_blocks(self, table: Held) -> bool:
        return len(table.block_ids) == -(-table.reserved // self.block_size)

    def has_its_names(self, table: Held) -> bool:
        return table.name_count == table.filled // self.block_size


def audit(books: Books) -> None:
    """Raises AssertionError with the first block or table that is wrong."""
    if not _is_sound(books):
        _blame(books)


def _is_sound(books: Books) -> bool:
    """What `_blame` asserts, for all blocks at once: a hundred times as fast."""
    explained = Counter(chain.from_iterable(table.block_ids for table in books.tables))
    free, cached, names = set(books.free), books.cached.keys(), books.block_named
    return (
        len(free) == len(books.free)
        and len(free) + len(cached) + len(explained) == len(books.refs)
        and free.isdisjoint(cached)
        and free.isdisjoint(explained)
        and cached.isdisjoint(explained)
        and sum(books.refs) == explained.total()
        and all(books.refs[block_id] == count for block_id, count in explained.items())
        and all(map(operator.eq, map(books.name_of.__getitem__, names.values()), names))
        and len(books.refs) - books.name_of.count(None) == len(names)
        and all(map(books.name_of.__getitem__, cached))
        and all(books.has_its_blocks(table) and books.has_its_names(table) for table in books.tables)
    )


def _blame(books: Books) -> None:
    explained = Counter(chain.from_iterable(table.block_ids for table in books.tables))
    free = set(books.free)
    assert len(free) == len(books.free), "a block is on the free list twice"
    for block_id, refs in enumerate(books.refs):
        holders = [table.owner for table in books.tables if block_id in table.block_ids]
        assert refs == explained[block_id], f"block {block_id} counts {refs} references, tables {holders} hold it"
        places = (block_id in free) + (block_id in books.cached) + (refs > 0)
        assert places == 1, f"block {block_id} with {refs} references is in {places} places instead of one"
        name = books.name_of[block_id]
        assert name is None or books.block_named.get(name) == block_id, f"block {block_id} has a name nobody finds"
        assert block_id not in books.cached or name is not None, f"block {block_id} is cached without a name"
    for table in books.tables:
        assert books.has_its_blocks(table), f"{table.owner}: table and token count disagree"
        assert books.has_its_names(table), f"{table.owner}: written blocks without a name"
    for name, block_id in books.block_named.items():
        assert books.name_of[block_id] == name, f"a name leads to block {block_id}, which has another"
    raise AssertionError("the pool's books disagree in a way that has no name")
