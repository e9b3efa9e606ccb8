"""What a pool tells of its prefix cache: whoever adds it up knows what is cached."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine import prefix_hash
from engine.block_pool import BlockPool
from engine.kv_events import KVEventBatch, KVEventNotes, short_name

PROMPT = (1, 2, 3, 4, 5, 6, 7, 8, 9)


def filled(pool: BlockPool, owner: str, prompt: tuple[int, ...]) -> None:
    cached = pool.new(owner, prompt)
    assert pool.append(owner, len(prompt) - cached) is not None
    pool.seal(owner, prompt, len(prompt))


def test_blocks_are_told_when_they_are_full_and_when_they_are_evicted() -> None:
    pool = BlockPool(3, 4, note_events=True)
    first, second = (short_name(name) for name in prefix_hash.chain(PROMPT, 4, b""))
    filled(pool, "a", PROMPT)
    assert pool.take_events() == KVEventBatch((first, second))
    assert pool.take_events() is None
    pool.free("a")
    assert pool.take_events() is None, "they can still be hit"
    pool.new("b")
    pool.append("b", 8)
    # The free block goes first, then the prompt's tail.
    assert pool.take_events() == KVEventBatch((), (second,))
    assert pool.cached_names() == (first,)


def test_nothing_is_noted_unless_it_is_asked_for() -> None:
    pool = BlockPool(3, 4)
    filled(pool, "a", PROMPT)
    assert pool.take_events() is None
    assert len(pool.snapshot().stored) == 2


def test_a_snapshot_is_all_that_there_is_and_changes_count_from_there() -> None:
    pool = BlockPool(4, 4, note_events=True)
    filled(pool, "a", PROMPT)
    snapshot = pool.snapshot()
    assert snapshot == KVEventBatch(pool.cached_names(), is_snapshot=True)
    assert pool.take_events() is None


def test_too_many_changes_become_a_snapshot() -> None:
    notes = KVEventNotes(limit=2)
    names = [bytes([number]) * 16 for number in range(4)]
    for name in names[:3]:
        notes.stored(name)
    notes.evicted(names[0])
    assert notes.take(names[1:3]) == KVEventBatch((short_name(names[1]), short_name(names[2])), is_snapshot=True)
    notes.stored(names[3])
    assert notes.take(names[1:]) == KVEventBatch((short_name(names[3]),))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("fill"), st.integers(0, 2), st.integers(1, 17)),
            st.tuples(st.just("free"), st.integers(0, 5), st.just(0)),
            st.tuples(st.just("tell"), st.just(0), st.just(0)),
        ),
        max_size=40,
    )
)
def test_the_sum_of_all_events_is_what_is_cached(moves: list[tuple[str, int, int]]) -> None:
    pool = BlockPool(6, 4, note_events=True)
    known: set[int] = set()
    owners: list[str] = []

    def tell() -> None:
        batch = pool.take_events()
        if batch is not None:
            known.difference_update(batch.evicted)
            known.update(batch.stored)

    for number, (move, which, length) in enumerate(moves):
        if move == "fill" and pool.blocks_for(length) <= pool.available_count:
            prompt = tuple(which + position % 3 for position in range(length))
            cached = pool.new(f"o{number}", prompt)
            owners.append(f"o{number}")
            if pool.append(owners[-1], length - cached) is not None:
                pool.seal(owners[-1], prompt, length)
        elif move == "free" and owners:
            pool.free(owners.pop(which % len(owners)))
        elif move == "tell":
            tell()
            assert known == set(pool.cached_names())
        pool.check()
    tell()
    assert known == set(pool.cached_names())
