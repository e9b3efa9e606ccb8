"""Which worker holds which prefix: block names by worker, from the workers' KV events and from what was just routed.

    worker's events   stored, evicted (a gap in their sequence asks for a snapshot)  ─▶  known
    a route           the first blocks of its prompt, as soon as they are routed     ─▶  hoped for, until an event says
                                                                                         so or HOPE_S has passed

Names are the first 8 bytes of a chain of hashes (engine/prefix_hash.py), which starts from the tenant's salt. A worker
that holds a block holds all that come before it: pools evict tails first. So the length of a hit is found by bisection.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from struct import Struct

from cluster.registry import KVEvents
from engine import prefix_hash

# A prompt that was routed should be computed, and reported, well within this time.
HOPE_S = 30.0
# Blocks of a routed prompt beyond its hit that are hoped for: naming all of a long prompt would take milliseconds.
HOPED_BLOCKS = 64
# Blocks that are named together: as many as are named already, within these bounds.
NAMED_AT_LEAST, NAMED_AT_MOST = 8, 64
EMPTY_HASH = blake2b(digest_size=prefix_hash.DIGEST_BYTES)
# The first 8 bytes of a name, little-endian.
SHORT_NAME = Struct(f"<Q{prefix_hash.DIGEST_BYTES - 8}x")
TOKEN_BYTES = 8


class BlockNames:
    """A prompt's block names for every block size, each computed once, when it is asked for."""

    def __init__(self, token_ids: Sequence[int], salt: bytes = b"") -> None:
        self._token_ids = token_ids
        self._salt = salt
        self._names: dict[int, list[int]] = {}
        self._tips: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Tokens that may be cached: the last one must be computed."""
        return len(self._token_ids) - 1

    def name(self, index: int, block_size: int) -> int | None:
        """The name of block `index`, None past the last full block that may be cached."""
        names = self.named(block_size)
        while index >= len(names):
            if (index + 1) * block_size > len(self):
                return None
            names = self.extend(block_size)
        return names[index]

    def named(self, block_size: int) -> list[int]:
        """The names that are known by now. Not to be changed."""
        names = self._names.get(block_size)
        if names is None:
            names = self._names[block_size] = []
            self._tips[block_size] = prefix_hash.root(self._salt)
        return names

    def extend(self, block_size: int) -> list[int]:
        """Names the next few blocks, if there are any; returns what `named` then does. As prefix_hash.extend names
        them, with one conversion for several: who holds one of them mostly holds the next."""
        names = self.named(block_size)
        first = len(names) * block_size
        count = min(max(NAMED_AT_LEAST, len(names)), NAMED_AT_MOST)
        # Copies of a hasher, and all names out of one run of bytes: twice as quick as the obvious way.
        data = memoryview(array("q", self._token_ids[first : min(first + count * block_size, len(self))])).cast("B")
        size, tip, copy = block_size * TOKEN_BYTES, self._tips[block_size], EMPTY_HASH.copy
        tips: list[bytes] = []
        for start in range(0, len(data) - size + 1, size):
            block = copy()
            block.update(tip)
            block.update(data[start : start + size])
            tip = block.digest()
            tips.append(tip)
        self._tips[block_size] = tip
        names.extend(name for (name,) in SHORT_NAME.iter_unpack(b"".join(tips)))
        return names


# One worker's id, or several as keys: in an order that is the same in every process, as that of a set is not.
Holders = str | dict[str, None]


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Who holds the beginning of one prompt: `levels[i]` are the holders of its block i."""

    block_size: int
    levels: Sequence[Holders] = ()

    def hit_tokens(self, worker_id: str) -> int:
        """Leading tokens of the prompt whose KV the worker holds."""
        low, high = 0, len(self.levels)
        # What was hoped for in vain is dropped piece by piece: then a tail may be left without its beginning.
        if not high or not _holds(self.levels[0], worker_id):
            return 0
        while low < high:
            middle = (low + high) // 2
            if _holds(self.levels[middle], worker_id):
                low = middle + 1
            else:
                high = middle
        return low * self.block_size

    def holders(self, count: int) -> list[str]:
        """Some workers with long hits: those of the last block first, then of ever earlier ones. At most `count`."""
        found: dict[str, None] = {}
        level = len(self.levels) - 1
        while level >= 0 and len(found) < count:
            holders = self.levels[level]
            for worker_id in (holders,) if isinstance(holders, str) else islice(holders, 4 * count):
                found[worker_id] = None
            level = level // 2 if level > 0 else -1
        return list(islice(found, count))


class PrefixIndex:
    """Block names by worker. At most `max_entries` (name, worker) pairs are kept; beyond that no new ones are taken.
    Beyond half of that no worker gets more than its equal share, so that one that names too many leaves others theirs.
    """

    def __init__(self, max_entries: int = 1 << 20) -> None:
        self._max_entries = max_entries
        self._holders: dict[int, Holders] = {}
        self._workers: dict[str, _Held] = {}
        self._hopes: deque[tuple[float, str, tuple[int, ...]]] = deque()
        self.entry_count = 0

    def apply(self, worker_id: str, events: KVEvents) -> bool:
        """Takes a report's news; False when reports are missing, so that a snapshot is wanted."""
        held = self._workers.setdefault(worker_id, _Held())
        if events.is_snapshot:
            self._release(worker_id, [*held.known, *held.hoped])
            held.known.clear()
            held.hoped.clear()
            held.has_gap = False
        elif held.sequence is not None and events.sequence <= held.sequence:
            return not held.has_gap
        elif held.sequence is None:
            held.has_gap = events.sequence > 1
        elif events.sequence != held.sequence + 1:
            held.has_gap = True
        held.sequence = events.sequence
        for name in events.stored:
            if name in held.hoped:
                del held.hoped[name]
                held.known.add(name)
            elif name not in held.known and self._add(worker_id, name):
                held.known.add(name)
        for name in events.evicted:
            if name in held.known:
                held.known.remove(name)
                self._discard(worker_id, name)
            elif held.hoped.pop(name, None) is not None:
                self._discard(worker_id, name)
        return not held.has_gap

    def hope(self, worker_id: str, names: BlockNames, block_size: int, first_block: int, now: float) -> None:
        """Counts on the worker to hold the next blocks from `first_block` on soon."""
        held = self._workers.setdefault(worker_id, _Held())
        hoped: list[int] = []
        for index in range(first_block, first_block + HOPED_BLOCKS):
            name = names.name(index, block_size)
            if name is None:
                break
            if name in held.hoped or (name not in held.known and self._add(worker_id, name)):
                held.hoped[name] = now + HOPE_S
                hoped.append(name)
        if hoped:
            self._hopes.append((now + HOPE_S, worker_id, tuple(hoped)))

    def forget(self, worker_id: str) -> None:
        """Drops all that a worker held: it is gone, or has started anew."""
        held = self._workers.pop(worker_id, None)
        if held is not None:
            self._release(worker_id, [*held.known, *held.hoped])

    def match(self, names: BlockNames | None, block_size: int, now: float) -> PrefixMatch:
        """Who holds how much of a prompt. Names are computed only as far as somebody holds them."""
        self._expire(now)
        levels: list[Holders] = []
        if names is None or not self._holders:
            return PrefixMatch(block_size)
        holders_of = self._holders.get
        known = names.named(block_size)
        while True:
            for name in known[len(levels) :]:
                holders = holders_of(name)
                if holders is None:
                    return PrefixMatch(block_size, levels)
                levels.append(holders)
            known = names.extend(block_size)
            if len(known) == len(levels):
                return PrefixMatch(block_size, levels)

    def holds(self, worker_id: str, name: int) -> bool:
        return _holds(self._holders.get(name, ""), worker_id)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _expire(self, now: float) -> None:
        while self._hopes and self._hopes[0][0] <= now:
            _, worker_id, names = self._hopes.popleft()
            held = self._workers.get(worker_id)
            for name in names:
                if held is not None and held.hoped.get(name, now + 1.0) <= now:
                    del held.hoped[name]
                    self._discard(worker_id, name)

    def _add(self, worker_id: str, name: int) -> bool:
        if 2 * self.entry_count >= self._max_entries:
            held = self._workers[worker_id]
            share = self._max_entries / len(self._workers)
            if self.entry_count >= self._max_entries or len(held.known) + len(held.hoped) >= share:
                return False
        self.entry_count += 1
        holders = self._holders.get(name)
        # Most blocks are held by one worker: a dict for each of them would take most of the memory.
        if holders is None:
            self._holders[name] = worker_id
        elif isinstance(holders, str):
            self._holders[name] = {holders: None, worker_id: None}
        else:
            holders[worker_id] = None
        return True

    def _discard(self, worker_id: str, name: int) -> None:
        self.entry_count -= 1
        holders = self._holders[name]
        if isinstance(holders, str):
            assert holders == worker_id, f"block {name:016x} is held by {holders}, not by {worker_id}"
            del self._holders[name]
            return
        del holders[worker_id]
        if not holders:
            del self._holders[name]

    def _release(self, worker_id: str, names: Iterable[int]) -> None:
        for name in names:
            self._discard(worker_id, name)


class _Held:
    """What one worker holds, or should soon, and the last of its reports."""

    __slots__ = ("has_gap", "hoped", "known", "sequence")

    def __init__(self) -> None:
        self.known: set[int] = set()
        self.hoped: dict[int, float] = {}
        self.sequence: int | None = None
        self.has_gap = False


def _holds(holders: Holders, worker_id: str) -> bool:
    return holders == worker_id if isinstance(holders, str) else worker_id in holders
