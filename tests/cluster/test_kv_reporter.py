"""What heartbeats say of a prefix cache, read by the index that the router reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.kv_reporter import KVReporter
from cluster.prefix_index import PrefixIndex
from cluster.registry import KVEvents
from engine.kv_events import KVEventBatch, KVEventNotes


class Cache:
    """A pool's names, and the notes that it takes of them."""

    def __init__(self, limit: int = 1000) -> None:
        self.names: dict[bytes, None] = {}
        self.notes = KVEventNotes(limit)

    def store(self, *numbers: int) -> None:
        for number in numbers:
            if name(number) not in self.names:
                self.names[name(number)] = None
                self.notes.stored(name(number))

    def evict(self, *numbers: int) -> None:
        for number in numbers:
            if name(number) in self.names:
                del self.names[name(number)]
                self.notes.evicted(name(number))

    def changes(self) -> KVEventBatch | None:
        return self.notes.take(self.names)

    def snapshot(self) -> KVEventBatch:
        return self.notes.snapshot(self.names)


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def report(reporter: KVReporter, cache: Cache) -> KVEvents:
    return reporter.report(cache.changes, cache.snapshot)


def test_a_snapshot_first_then_changes():
    reporter, cache = KVReporter(), Cache()
    assert report(reporter, cache) == KVEvents(1, is_snapshot=True)
    cache.store(5, 7)
    assert report(reporter, cache) == KVEvents(2, is_snapshot=False, stored=(5, 7))
    assert report(reporter, cache) == KVEvents(3, is_snapshot=False), "nothing new, and a number all the same"
    cache.evict(5)
    cache.store(9)
    assert report(reporter, cache) == KVEvents(4, is_snapshot=False, stored=(9,), evicted=(5,))


def test_a_resync_says_everything():
    reporter, cache = KVReporter(), Cache()
    cache.store(5, 7)
    report(reporter, cache)
    reporter.resync()
    cache.evict(7)
    assert report(reporter, cache) == KVEvents(2, is_snapshot=True, stored=(5,))
    assert report(reporter, cache) == KVEvents(3, is_snapshot=False)


def test_more_changes_than_the_pool_notes_are_a_snapshot():
    reporter, cache = KVReporter(), Cache(limit=3)
    report(reporter, cache)
    cache.store(*range(5))
    assert report(reporter, cache) == KVEvents(2, is_snapshot=True, stored=tuple(range(5)))


def test_a_large_snapshot_is_told_in_pieces_and_what_goes_meanwhile_is_not_told():
    reporter, cache = KVReporter(max_names=3), Cache()
    cache.store(*range(7))
    assert report(reporter, cache) == KVEvents(1, is_snapshot=True, stored=(0, 1, 2))
    cache.evict(4, 0)
    cache.store(9)
    assert report(reporter, cache) == KVEvents(2, is_snapshot=False, stored=(3,), evicted=(4, 0))
    assert report(reporter, cache) == KVEvents(3, is_snapshot=False, stored=(5, 6, 9))
    assert report(reporter, cache) == KVEvents(4, is_snapshot=False)


change = st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=8)
# What becomes of a report: it arrives, or is lost, which nobody tells the worker; or it has a new pool beforehand.
step = st.tuples(change, st.sampled_from(["arrives", "arrives", "arrives", "is lost", "new pool"]))


@given(st.lists(step, max_size=20))
def test_the_index_ends_up_with_what_the_pool_holds(steps: list[tuple[list[tuple[bool, int]], str]]):
    reporter, index, cache = KVReporter(max_names=7), PrefixIndex(), Cache(limit=6)
    for changes, fate in [*steps, *[([], "arrives")] * 4]:
        if fate == "new pool":
            cache = Cache(limit=6)
            reporter.resync()
        for is_stored, number in changes:
            (cache.store if is_stored else cache.evict)(number)
        events = report(reporter, cache)
        if fate != "is lost" and not index.apply("w", events):
            reporter.resync()
    assert {number for number in range(10) if index.holds("w", number)} == {
        number for number in range(10) if name(number) in cache.names
    }
