"""The prefix index: names, events, gaps, hopes; and all of it at random against a dictionary of sets."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.prefix_index import HOPE_S, HOPED_BLOCKS, BlockNames, PrefixIndex
from cluster.registry import KVEvents
from engine import prefix_hash

SIZE = 4
PROMPT = tuple(range(41))


def names_of(prompt: BlockNames, blocks: int, size: int = SIZE) -> tuple[int, ...]:
    return tuple(prompt.name(index, size) or 0 for index in range(blocks))


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("salt", [b"", b"tenant"])
def test_names_are_the_pools_own_in_short_and_the_last_token_is_never_cached(size: int, salt: bytes) -> None:
    prompt = BlockNames(PROMPT[:33], salt)
    chain = [int.from_bytes(name[:8], "little") for name in prefix_hash.chain(PROMPT[:32], size, salt)]
    # Asked for out of order, as a bisection would.
    assert prompt.name(len(chain) - 1, size) == chain[-1]
    assert [prompt.name(index, size) for index in range(len(chain))] == chain
    assert prompt.name(len(chain), size) is None
    assert BlockNames(PROMPT[:32]).name(32 // size - 1, size) is None


def test_a_hit_is_as_long_as_the_worker_holds_the_beginning() -> None:
    index, prompt = PrefixIndex(), BlockNames(PROMPT)
    index.apply("a", KVEvents(1, True, names_of(prompt, 10)))
    index.apply("b", KVEvents(1, True, names_of(prompt, 3)))
    index.apply("c", KVEvents(1, True, names_of(BlockNames(PROMPT, b"other"), 10)))
    match = index.match(prompt, SIZE, 0.0)
    assert [match.hit_tokens(name) for name in "abcd"] == [40, 12, 0, 0]
    assert match.holders(2) == ["a", "b"]
    assert match.holders(1) == ["a"]
    assert index.match(None, SIZE, 0.0).holders(3) == []
    index.apply("a", KVEvents(2, False, (), names_of(prompt, 10)[2:]))
    assert [index.match(prompt, SIZE, 0.0).hit_tokens(name) for name in "ab"] == [8, 12]


def test_names_are_computed_only_as_far_as_somebody_holds_them() -> None:
    index, prompt = PrefixIndex(), BlockNames(tuple(range(100_000)))
    index.apply("a", KVEvents(1, True, names_of(BlockNames(tuple(range(100_000))), 3, 16)))
    assert index.match(prompt, 16, 0.0).hit_tokens("a") == 48
    assert len(prompt._names[16]) <= 16


def test_a_gap_asks_for_a_snapshot_until_one_comes() -> None:
    index, prompt = PrefixIndex(), BlockNames(PROMPT)
    names = names_of(prompt, 10)
    assert index.apply("a", KVEvents(1, False, names[:1]))
    assert index.apply("a", KVEvents(2, False, names[1:2]))
    assert index.apply("a", KVEvents(2, False, (), names[:2])), "the same report twice"
    assert not index.apply("a", KVEvents(4, False, names[2:3]))
    assert not index.apply("a", KVEvents(5, False, names[3:4]))
    assert index.match(prompt, SIZE, 0.0).hit_tokens("a") == 16
    assert index.apply("a", KVEvents(6, True, names[:1]))
    assert index.match(prompt, SIZE, 0.0).hit_tokens("a") == 4
    assert not index.apply("late", KVEvents(7, False)), "a gateway that has missed the beginning"


def test_what_was_routed_is_hoped_for_until_it_is_known_or_time_has_passed() -> None:
    index, prompt = PrefixIndex(), BlockNames(PROMPT)
    names = names_of(prompt, 10)
    index.hope("a", prompt, SIZE, 0, now=0.0)
    index.hope("b", prompt, SIZE, 0, now=5.0)
    assert index.match(prompt, SIZE, 1.0).hit_tokens("a") == 40
    index.apply("a", KVEvents(1, False, names[:3]))
    assert index.match(prompt, SIZE, HOPE_S).hit_tokens("a") == 12
    assert index.match(prompt, SIZE, HOPE_S).hit_tokens("b") == 40
    index.hope("b", prompt, SIZE, 2, now=HOPE_S)
    assert index.match(prompt, SIZE, HOPE_S + 5.0).hit_tokens("b") == 0
    assert index.holds("b", names[5])
    assert not index.holds("b", names[0])
    index.match(prompt, SIZE, 2 * HOPE_S)
    index.forget("a")
    assert index.entry_count == 0


def test_only_so_many_blocks_of_a_long_prompt_are_hoped_for() -> None:
    index, prompt = PrefixIndex(), BlockNames(tuple(range(100_000)))
    index.hope("a", prompt, 16, 0, now=0.0)
    assert index.entry_count == HOPED_BLOCKS
    assert index.match(prompt, 16, 0.0).hit_tokens("a") == 16 * HOPED_BLOCKS


def test_memory_is_bounded() -> None:
    index = PrefixIndex(max_entries=5)
    index.apply("a", KVEvents(1, True, tuple(range(100))))
    index.apply("b", KVEvents(1, True, tuple(range(100))))
    assert index.entry_count == 5
    index.apply("a", KVEvents(2, False, (), tuple(range(100))))
    index.apply("b", KVEvents(2, False, (7,), ()))
    assert index.entry_count == 1
    assert index.holds("b", 7)


def test_one_that_names_too_many_leaves_others_their_share() -> None:
    index = PrefixIndex(max_entries=1000)
    for worker in "abc":
        index.apply(worker, KVEvents(1, True))
    index.apply("liar", KVEvents(1, True, tuple(range(10_000))))
    for number, worker in enumerate("abc"):
        names = tuple(range(20_000 + 1000 * number, 20_000 + 1000 * number + 166))
        index.apply(worker, KVEvents(2, False, names))
        assert all(index.holds(worker, name) for name in names)


class PrefixMachine(RuleBasedStateMachine):
    """Workers that store and evict chains from the tail, lose reports, restart; and routes in between."""

    prompts = tuple(BlockNames((first,) * 8 + tuple(range(33))) for first in range(3))
    workers = ("a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.truth = {worker: [0, 0, 0] for worker in self.workers}
        self.sequence = dict.fromkeys(self.workers, 0)
        self.hoped: dict[tuple[str, int], float] = {}
        self.gap = set[str]()
        self.now = 0.0

    @rule(worker=st.sampled_from(workers), prompt=st.integers(0, 2), blocks=st.integers(0, 10), lost=st.booleans())
    def report(self, worker: str, prompt: int, blocks: int, lost: bool) -> None:
        names = names_of(self.prompts[prompt], 10)
        before, self.truth[worker][prompt] = self.truth[worker][prompt], blocks
        self.sequence[worker] += 1
        if lost:
            self.gap.add(worker)
            return
        whole = worker in self.gap
        if whole:
            held = [name for each in range(3) for name in names_of(self.prompts[each], self.truth[worker][each])]
            events = KVEvents(self.sequence[worker], True, tuple(held))
            self.gap.discard(worker)
            self.hoped = {key: until for key, until in self.hoped.items() if key[0] != worker}
        else:
            events = KVEvents(self.sequence[worker], False, names[before:blocks], names[blocks:])
            self.hoped.pop((worker, prompt), None)
        assert self.index.apply(worker, events)

    @rule(worker=st.sampled_from(workers), prompt=st.integers(0, 2))
    def route(self, worker: str, prompt: int) -> None:
        if worker not in self.gap:
            self.index.hope(worker, self.prompts[prompt], SIZE, self.truth[worker][prompt], self.now)
            self.hoped[worker, prompt] = self.now + HOPE_S

    @rule(worker=st.sampled_from(workers))
    def restart(self, worker: str) -> None:
        self.index.forget(worker)
        self.truth[worker], self.sequence[worker] = [0, 0, 0], 0
        self.gap.discard(worker)
        self.hoped = {key: until for key, until in self.hoped.items() if key[0] != worker}

    @rule(seconds=st.floats(0, HOPE_S))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def hits_are_what_the_workers_hold_or_should(self) -> None:
        for number, prompt in enumerate(self.prompts):
            match = self.index.match(prompt, SIZE, self.now)
            for worker in set(self.workers) - self.gap:
                is_hoped = self.hoped.get((worker, number), -1.0) > self.now
                expected = 10 if is_hoped else self.truth[worker][number]
                assert match.hit_tokens(worker) == SIZE * expected, (worker, number)
            for worker in match.holders(3):
                assert match.hit_tokens(worker) > 0
            best = max(self.workers, key=match.hit_tokens)
            if match.hit_tokens(best):
                assert match.hit_tokens(match.holders(1)[0]) == match.hit_tokens(best)


PrefixMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestPrefixMachine = PrefixMachine.TestCase


def test_holders_come_in_an_order_that_does_not_depend_on_the_process() -> None:
    """A set of strings has another order in every process: emulations of the same seed would differ."""
    index, prompt = PrefixIndex(), BlockNames(tuple(range(40)), b"")
    workers = [f"worker-{number}" for number in (7, 3, 9, 1, 8, 2)]
    for worker in workers:
        index.apply(worker, KVEvents(0, True, (prompt.name(0, SIZE) or 0,)))
    assert index.match(prompt, SIZE, 0.0).holders(6) == workers
