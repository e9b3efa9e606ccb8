"""What changes in a worker's prefix cache, for a router that wants to know who holds which prefix.

A name is told by its first 8 bytes: enough to tell blocks apart, and half of what the whole name takes. A wrong guess
costs a prompt's cached prefix, never a wrong answer: the worker itself looks names up in full.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Changes that are noted between two calls of `take`; with more, everything is told anew.
NOTES_LIMIT = 1 << 15


@dataclass(frozen=True, slots=True)
class KVEventBatch:
    """Names that can be hit now and could not before, and the other way round, as the first 8 bytes of each, a little-
    endian integer. With `is_snapshot`, `stored` is all that there is."""

    stored: tuple[int, ...]
    evicted: tuple[int, ...] = ()
    is_snapshot: bool = False


class KVEventNotes:
    """Collects changes; the last one of each name counts."""

    def __init__(self, limit: int = NOTES_LIMIT) -> None:
        self._limit = limit
        self._is_stored: dict[int, bool] = {}
        self._has_too_many = False

    def stored(self, name: bytes) -> None:
        self._note(name, True)

    def evicted(self, name: bytes) -> None:
        self._note(name, False)

    def take(self, all_names: Iterable[bytes]) -> KVEventBatch | None:
        """Changes since the last call, None without any; a snapshot when there were too many of them."""
        if self._has_too_many:
            return self.snapshot(all_names)
        if not self._is_stored:
            return None
        changes, self._is_stored = self._is_stored, {}
        stored = tuple(name for name, is_stored in changes.items() if is_stored)
        return KVEventBatch(stored, tuple(name for name, is_stored in changes.items() if not is_stored))

    def snapshot(self, all_names: Iterable[bytes]) -> KVEventBatch:
        """Everything; `take` goes on from here."""
        self._is_stored = {}
        self._has_too_many = False
        return KVEventBatch(short_names(all_names), is_snapshot=True)

    def _note(self, name: bytes, is_stored: bool) -> None:
        if self._has_too_many:
            return
        self._is_stored[short_name(name)] = is_stored
        if len(self._is_stored) > self._limit:
            self._has_too_many = True
            self._is_stored = {}


def short_name(name: bytes) -> int:
    return int.from_bytes(name[:8], "little")


def short_names(names: Iterable[bytes]) -> tuple[int, ...]:
    return tuple(map(short_name, names))
