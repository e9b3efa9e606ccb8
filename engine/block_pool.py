"""The KV block pool's books: which block belongs to whom, what may be reused, what is free.

A sequence's tokens, and the blocks under them (half-open ranges, block size 4):

    tokens   [0 ............ sealed)[sealed ... filled)[filled ..... reserved)
    blocks   |  full, named, may be  |  written, the   |  reserved, not yet
             |  shared by the cache  |  tail not full  |  written

Every block is in exactly one place:

    free      nobody refers to it, no content worth keeping    ─ taken first
    cached    nobody refers to it, but its name is known       ─ taken when nothing is free, least recently used first
    in use    `refs` tables refer to it                        ─ never taken, never written while refs > 1

Only this class touches reference counts. It is plain bookkeeping: no tensors, no I/O, no clock. The one owner of a pool
is its worker's loop, which calls `free` and `truncate` only between steps.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from engine import prefix_hash
from engine.block_audit import Books, Held, audit
from engine.kv_events import KVEventBatch, KVEventNotes, short_names
from engine.pool_counts import PoolCounts


@dataclass(frozen=True, slots=True)
class Append:
    """What `append` did: the copies (source, target) that must run before the new slots are written."""

    copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Sealed:
    """A block that has just become full: `index` in its sequence, `block_id`, and its `name` in the prefix cache."""

    index: int
    block_id: int
    name: bytes


@dataclass(slots=True)
class _Table:
    """One sequence's blocks. `names` has one entry per sealed block; `tip` is the name that the next one extends."""

    block_ids: list[int] = field(default_factory=list)
    reserved: int = 0
    filled: int = 0
    names: list[bytes] = field(default_factory=list)
    salt_root: bytes = b""

    @property
    def tip(self) -> bytes:
        return self.names[-1] if self.names else self.salt_root


# How often an idle worker checks its pool: a check takes some 0.1 µs a block.
CHECK_BLOCK_S = 2e-3


class BlockPool:
    """Allocates blocks to named owners (one table each), shares them by reference, and caches finished prefixes.

    `counts` is kept by those who use the pool.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prefix_cache: bool = True, *, note_events: bool = False
    ) -> None:
        assert num_blocks * block_size > 0, f"a pool of {num_blocks} blocks of {block_size} tokens holds nothing"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._refs = [0] * num_blocks
        self._name_of: list[bytes | None] = [None] * num_blocks
        self._block_named: dict[bytes, int] = {}
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._tables: dict[str, _Table] = {}
        self._next_check_s = -math.inf
        self._notes = KVEventNotes() if note_events else None
        self.counts = PoolCounts()

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def available_count(self) -> int:
        """Blocks that can be had now: free ones, and cached ones that would be evicted."""
        return len(self._free) + len(self._cached)

    @property
    def cached_count(self) -> int:
        return len(self._cached)

    @property
    def owners(self) -> tuple[str, ...]:
        return tuple(self._tables)

    def owns(self, owner: str) -> bool:
        return owner in self._tables

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def table(self, owner: str) -> tuple[int, ...]:
        """Block ids of `owner` in token order."""
        return tuple(self._tables[owner].block_ids)

    def block_count(self, owner: str) -> int:
        return len(self._tables[owner].block_ids)

    def reserved(self, owner: str) -> int:
        """Tokens for which `owner` has slots."""
        return self._tables[owner].reserved

    def next_blocks(self, count: int) -> tuple[int, ...]:
        """The `count` blocks that would be taken next, in that order. Nobody has them yet."""
        assert count <= self.available_count, f"{count} blocks of {self.available_count}"
        return tuple(islice(chain(self._free, self._cached), count))

    def filled(self, owner: str) -> int:
        """Tokens of `owner` whose KV is written."""
        return self._tables[owner].filled

    def lookup(self, token_ids: Sequence[int], salt: bytes = b"") -> int:
        """Tokens of this prompt that `new` would find in the cache. Changes nothing."""
        return len(self._match(token_ids, salt)) * self.block_size

    def cached_names(self) -> tuple[int, ...]:
        """Every block name that can be hit, in short (engine/kv_events.py)."""
        return short_names(self._block_named)

    def take_events(self) -> KVEventBatch | None:
        """What has changed in the prefix cache since the last call, or `snapshot`; None without changes, or notes."""
        return None if self._notes is None else self._notes.take(self._block_named)

    def snapshot(self) -> KVEventBatch:
        """All that is in the prefix cache now."""
        if self._notes is None:
            return KVEventBatch(self.cached_names(), is_snapshot=True)
        return self._notes.snapshot(self._block_named)

    # ── verbs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def new(self, owner: str, token_ids: Sequence[int] = (), salt: bytes = b"") -> int:
        """Opens a table for `owner` over the longest cached prefix of `token_ids`; returns that prefix's tokens.

        The prompt's last token is never counted as cached: somebody must compute it to get logits.
        """
        assert owner not in self._tables, f"{owner} already has a table; two requests would share one"
        table = _Table(salt_root=prefix_hash.root(salt))
        for name, block_id in self._match(token_ids, salt):
            self._ref(block_id)
            table.block_ids.append(block_id)
            table.names.append(name)
        table.reserved = table.filled = len(table.block_ids) * self.block_size
        self._tables[owner] = table
        return table.filled

    def append(self, owner: str, count: int) -> Append | None:
        """Reserves slots for `count` more tokens. None when there are too few blocks; then nothing has changed.

        A tail block that others refer to as well is replaced by a fresh one, and the copy that this owes is returned.
        """
        table = self._tables[owner]
        end = table.reserved + count
        new_blocks = self.blocks_for(end) - len(table.block_ids)
        tail = table.reserved // self.block_size
        # Only a partly reserved tail is written again; blocks before it are complete.
        must_copy = count > 0 and tail < len(table.block_ids) and self._refs[table.block_ids[tail]] > 1
        if new_blocks + must_copy > self.available_count:
            return None
        copies: tuple[tuple[int, int], ...] = ()
        if must_copy:
            source, target = table.block_ids[tail], self._take()
            table.block_ids[tail] = target
            self._unref(source)
            copies = ((source, target),)
        elif count > 0 and tail < len(table.block_ids):
            # A truncated block still has the name of its old content, which is about to be overwritten.
            self._forget(table.block_ids[tail])
        table.block_ids.extend(self._take() for _ in range(new_blocks))
        table.reserved = end
        return Append(copies)

    def append_block(self, owner: str) -> int:
        """Reserves the slots of one more block for an owner whose blocks are reserved to the end; returns the block.
        The same as `append` of so many tokens, where there is a block."""
        table = self._tables[owner]
        assert table.reserved == len(table.block_ids) * self.block_size, f"{owner} has room in its last block"
        block_id = self._take()
        table.block_ids.append(block_id)
        table.reserved += self.block_size
        return block_id

    def fork(self, parent: str, child: str) -> None:
        """Gives `child` the same blocks, by reference. Whoever appends first copies the shared tail."""
        assert child not in self._tables, f"{child} already has a table"
        source = self._tables[parent]
        # Slots that are reserved but not written would be written by both.
        assert source.filled == source.reserved, f"{parent} has {source.reserved - source.filled} unwritten slots"
        for block_id in source.block_ids:
            self._ref(block_id)
        self._tables[child] = _Table(
            list(source.block_ids), source.reserved, source.filled, list(source.names), source.salt_root
        )

    def truncate(self, owner: str, num_tokens: int) -> None:
        """Gives back everything after the first `num_tokens` tokens."""
        table = self._tables[owner]
        assert 0 <= num_tokens <= table.reserved, f"{owner} holds {table.reserved} tokens, cannot keep {num_tokens}"
        keep = self.blocks_for(num_tokens)
        self._release(table.block_ids[keep:])
        del table.block_ids[keep:]
        del table.names[num_tokens // self.block_size :]
        table.reserved = num_tokens
        table.filled = min(table.filled, num_tokens)

    def seal(self, owner: str, token_ids: Sequence[int], filled: int) -> tuple[Sealed, ...]:
        """Records that the KV of `token_ids[:filled]` is written; names the blocks that became full.

        Only here do blocks enter the prefix cache, so nobody ever hits a block that is reserved but not yet written.
        """
        table = self._tables[owner]
        assert table.filled <= filled <= min(table.reserved, len(token_ids)), (
            f"{owner}: {filled} tokens cannot be written, {table.filled} were and {table.reserved} are reserved"
        )
        table.filled = filled
        sealed: list[Sealed] = []
        for index in range(len(table.names), filled // self.block_size):
            start = index * self.block_size
            name = prefix_hash.extend(table.tip, token_ids[start : start + self.block_size])
            table.names.append(name)
            block_id = table.block_ids[index]
            self._remember(block_id, name)
            sealed.append(Sealed(index, block_id, name))
        return tuple(sealed)

    def export(self, owner: str, first_token: int, end_token: int) -> tuple[int, ...]:
        """The blocks that hold tokens [first_token, end_token), all of them written. `first_token` starts a block."""
        table = self._tables[owner]
        assert first_token % self.block_size == 0, f"an export starts at a block's first token, not at {first_token}"
        assert end_token <= table.filled, f"{owner}: token {end_token - 1} is not written yet and must not be sent"
        return tuple(table.block_ids[first_token // self.block_size : self.blocks_for(end_token)])

    def free(self, owner: str) -> None:
        """Closes the table and gives its blocks back, the tail first, so that the tail is evicted before the head."""
        self._release(self._tables.pop(owner).block_ids)

    def check(self) -> None:
        """free + cached + in use = total, and every reference is explained by a table. Raises AssertionError."""
        tables = [
            Held(owner, table.block_ids, table.reserved, table.filled, len(table.names))
            for owner, table in self._tables.items()
        ]
        audit(Books(self.block_size, self._refs, self._name_of, self._block_named, self._free, self._cached, tables))

    def check_at_times(self, now: float) -> None:
        """`check`, for whoever is idle often: it looks at every block, and so is made the more seldom the more there
        are. `now` in seconds of any clock."""
        if now >= self._next_check_s:
            if self._next_check_s > -math.inf:
                self.check()
            self._next_check_s = now + self.num_blocks * CHECK_BLOCK_S

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _match(self, token_ids: Sequence[int], salt: bytes) -> list[tuple[bytes, int]]:
        if not self._prefix_cache:
            return []
        hits: list[tuple[bytes, int]] = []
        for name in prefix_hash.chain(token_ids[:-1], self.block_size, salt):
            block_id = self._block_named.get(name)
            if block_id is None:
                break
            hits.append((name, block_id))
        return hits

    def _take(self) -> int:
        if self._free:
            block_id = self._free.popleft()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
        assert self._refs[block_id] == 0, f"block {block_id} was free while {self._refs[block_id]} tables hold it"
        self._refs[block_id] = 1
        return block_id

    def _ref(self, block_id: int) -> None:
        if self._refs[block_id] == 0:
            del self._cached[block_id]
        self._refs[block_id] += 1

    def _unref(self, block_id: int) -> None:
        assert self._refs[block_id] > 0, f"block {block_id} is given back twice"
        self._refs[block_id] -= 1
        if self._refs[block_id]:
            return
        if self._name_of[block_id] is None:
            self._free.append(block_id)
        else:
            self._cached[block_id] = None

    def _release(self, block_ids: Sequence[int]) -> None:
        for block_id in reversed(block_ids):
            self._unref(block_id)

    def _remember(self, block_id: int, name: bytes) -> None:
        # The first block of a name keeps it; an equal one computed meanwhile stays private and is simply freed later.
        if self._prefix_cache and name not in self._block_named and self._name_of[block_id] is None:
            self._block_named[name] = block_id
            self._name_of[block_id] = name
            if self._notes is not None:
                self._notes.stored(name)

    def _forget(self, block_id: int) -> None:
        name = self._name_of[block_id]
        if name is not None:
            del self._block_named[name]
            self._name_of[block_id] = None
            if self._notes is not None:
                self._notes.evicted(name)
