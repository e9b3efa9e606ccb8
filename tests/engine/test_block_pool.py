"""The block pool in small: pools of 4 to 6 blocks, exact ids.

Each drawing shows the pool after the step above it:  free: taken left first | cached: evicted left first | owner: table
"""

import pytest

from engine.block_pool import Append, BlockPool


def ids(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def fill(pool: BlockPool, owner: str, tokens: list[int], salt: bytes = b"") -> int:
    """A whole request's way into the pool: look up, reserve, write, seal. Returns the tokens that were cached."""
    cached = pool.new(owner, tokens, salt)
    assert pool.append(owner, len(tokens) - cached) is not None
    pool.seal(owner, tokens, len(tokens))
    pool.check()
    return cached


def test_blocks_are_taken_in_order_and_given_back_tail_first():
    pool = BlockPool(num_blocks=5, block_size=2, prefix_cache=False)
    pool.new("a")
    assert pool.append("a", 5) == Append()
    # free: 3 4 | a: 0 1 2(half)
    assert pool.table("a") == (0, 1, 2)
    assert pool.append("a", 1) == Append(), "the sixth token fits into block 2"
    assert pool.table("a") == (0, 1, 2)
    pool.free("a")
    # free: 3 4 2 1 0
    pool.new("b")
    pool.append("b", 10)
    assert pool.table("b") == (3, 4, 2, 1, 0)
    pool.free("b")
    pool.check()


def test_exhaustion_returns_none_and_changes_nothing():
    pool = BlockPool(num_blocks=4, block_size=2)
    fill(pool, "a", ids(4))
    pool.free("a")
    # free: 2 3 | cached: 1 0
    pool.new("b", ids(5))
    # free: 2 3 | b: 0 1
    assert pool.append("b", 1) == Append()
    # free: 3 | b: 0 1 2(half)
    pool.new("c", ids(3, 100))
    for _ in range(2):
        assert pool.append("c", 3) is None, "two blocks are needed and one is there"
        assert (pool.table("b"), pool.table("c"), pool.available_count) == ((0, 1, 2), (), 1)
        pool.check()
    assert pool.append("c", 2) == Append(), "the smaller wish still fits"
    assert pool.table("c") == (3,)


def test_exhaustion_counts_the_copy_that_copy_on_write_needs():
    pool = BlockPool(num_blocks=2, block_size=4)
    fill(pool, "a", ids(6))
    # free: none | a: 0 1(half)
    pool.fork("a", "b")
    assert pool.append("b", 1) is None, "block 1 is shared and nothing is left to copy it to"
    assert pool.table("b") == (0, 1)
    pool.free("a")
    assert pool.append("b", 1) == Append(), "b is alone now, and writes in place"
    pool.check()


def test_the_tail_is_evicted_before_the_head():
    pool = BlockPool(num_blocks=4, block_size=2)
    fill(pool, "a", ids(6))
    pool.free("a")
    # free: 3 | cached: 2 1 0
    assert pool.cached_count == 3
    pool.new("b")
    pool.append("b", 4)
    # cached: 1 0 | b: 3 2
    assert pool.table("b") == (3, 2)
    assert pool.lookup(ids(7)) == 4, "blocks 0 and 1 still serve the head of the prompt"
    pool.append("b", 2)
    # cached: 0 | b: 3 2 1
    assert pool.lookup(ids(7)) == 2
    pool.check()


def test_the_least_recently_used_prefix_is_evicted_first():
    pool = BlockPool(num_blocks=4, block_size=2)
    fill(pool, "a", ids(2))
    fill(pool, "b", ids(2, 100))
    pool.free("a")
    pool.free("b")
    # free: 2 3 | cached: 0 1
    pool.new("c", ids(3))
    pool.free("c")
    # free: 2 3 | cached: 1 0      a's prefix was used again, b's was not
    pool.new("d")
    pool.append("d", 6)
    assert pool.table("d") == (2, 3, 1)
    assert (pool.lookup(ids(3)), pool.lookup(ids(3, 100))) == (2, 0)


def test_a_hit_takes_blocks_out_of_the_cache():
    pool = BlockPool(num_blocks=3, block_size=2)
    fill(pool, "a", ids(4))
    pool.free("a")
    # free: 2 | cached: 1 0
    assert pool.new("b", ids(5)) == 4
    # free: 2 | b: 0 1
    assert (pool.available_count, pool.cached_count) == (1, 0)
    pool.new("c")
    assert pool.append("c", 4) is None, "what b has hit cannot be evicted"
    pool.check()


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_two_requests_share_a_prefix_and_free_in_either_order(order: tuple[str, str]):
    pool = BlockPool(num_blocks=6, block_size=2)
    assert fill(pool, "a", [1, 2, 3, 4, 5, 6]) == 0
    assert fill(pool, "b", [1, 2, 3, 4, 7, 8]) == 4
    # free: 4 5 | a: 0 1 2 | b: 0 1 3
    assert (pool.table("a"), pool.table("b")) == ((0, 1, 2), (0, 1, 3))
    pool.free(order[0])
    assert pool.cached_count == 1, "only its own last block; the shared ones are still read"
    pool.check()
    pool.free(order[1])
    assert (pool.cached_count, pool.available_count, pool.owners) == (4, 6, ())
    pool.check()


def test_a_name_covers_what_came_before_it():
    pool = BlockPool(num_blocks=6, block_size=2)
    fill(pool, "a", [1, 2, 3, 4])
    assert pool.lookup([1, 2, 3, 4, 0]) == 4
    assert pool.lookup([9, 9, 3, 4, 0]) == 0, "the second block is equal, what precedes it is not"
    assert pool.lookup([3, 4, 0]) == 0


def test_salts_keep_tenants_apart():
    pool = BlockPool(num_blocks=6, block_size=2)
    fill(pool, "a", ids(5), salt=b"one")
    assert pool.lookup(ids(5), salt=b"one") == 4
    assert pool.lookup(ids(5), salt=b"two") == 0
    assert pool.lookup(ids(5)) == 0


@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (6, 4)])
def test_the_last_token_is_always_computed(tokens: int, cached: int):
    pool = BlockPool(num_blocks=6, block_size=2)
    fill(pool, "a", ids(6))
    assert pool.lookup(ids(tokens)) == cached
    assert pool.new("b", ids(tokens)) == cached
    assert pool.table("b") == (0, 1, 2)[: cached // 2]


def test_no_hit_on_blocks_that_are_reserved_but_not_written():
    pool = BlockPool(num_blocks=6, block_size=2)
    pool.new("a", ids(6))
    pool.append("a", 6)
    assert pool.lookup(ids(6)) == 0
    assert pool.seal("a", ids(6), 3)[0].block_id == 0
    # a: 0(sealed) 1(half written) 2(reserved)
    assert pool.lookup(ids(6)) == 2
    pool.free("a")
    # free: 3 4 5 2 1 | cached: 0
    assert pool.lookup(ids(6)) == 2, "what was never written is not remembered after free either"
    assert pool.cached_count == 1
    pool.check()


def test_seal_names_each_block_once_in_order():
    pool = BlockPool(num_blocks=4, block_size=2)
    pool.new("a", ids(7))
    pool.append("a", 7)
    assert [(sealed.index, sealed.block_id) for sealed in pool.seal("a", ids(7), 1)] == []
    assert [(sealed.index, sealed.block_id) for sealed in pool.seal("a", ids(7), 5)] == [(0, 0), (1, 1)]
    assert [(sealed.index, sealed.block_id) for sealed in pool.seal("a", ids(7), 6)] == [(2, 2)]
    assert pool.seal("a", ids(7), 7) == ()
    assert pool.filled("a") == 7


def test_equal_blocks_computed_twice_have_one_name():
    pool = BlockPool(num_blocks=4, block_size=2)
    for owner in ("a", "b"):
        pool.new(owner, ids(2))
        pool.append(owner, 2)
    first, second = pool.seal("a", ids(2), 2), pool.seal("b", ids(2), 2)
    assert first[0].name == second[0].name
    pool.free("a")
    pool.free("b")
    # free: 2 3 1 | cached: 0      b's block was never found by anybody, so it is simply free
    assert pool.cached_count == 1
    pool.check()


def test_fork_copies_the_shared_tail_on_the_first_append():
    pool = BlockPool(num_blocks=6, block_size=4)
    fill(pool, "a", ids(6))
    pool.fork("a", "b")
    # free: 2 3 4 5 | a: 0 1(half) | b: 0 1(half)
    assert pool.append("b", 1) == Append(copies=((1, 2),))
    # free: 3 4 5 | a: 0 1 | b: 0 2
    assert (pool.table("a"), pool.table("b")) == ((0, 1), (0, 2))
    assert pool.append("a", 1) == Append(), "a is now the only reader of its tail"
    assert pool.append("b", 1) == Append()
    pool.check()


def test_three_ways_of_a_fork_owe_two_copies():
    pool = BlockPool(num_blocks=6, block_size=4)
    fill(pool, "a", ids(3))
    pool.fork("a", "b")
    pool.fork("b", "c")
    copies = [pool.append(owner, 1) for owner in "abc"]
    assert copies == [Append(((0, 1),)), Append(((0, 2),)), Append()]
    assert [pool.table(owner) for owner in "abc"] == [(1,), (2,), (0,)]
    pool.check()


def test_fork_at_a_block_boundary_owes_no_copy():
    pool = BlockPool(num_blocks=6, block_size=4)
    fill(pool, "a", ids(4))
    pool.fork("a", "b")
    assert pool.append("a", 1) == Append()
    assert pool.append("b", 1) == Append()
    assert (pool.table("a"), pool.table("b")) == ((0, 1), (0, 2))
    pool.check()


def test_truncate_gives_back_whole_blocks_only():
    pool = BlockPool(num_blocks=4, block_size=2, prefix_cache=False)
    fill(pool, "a", ids(7))
    pool.truncate("a", 3)
    # free: 3 2 | a: 0 1(half)
    assert (pool.table("a"), pool.filled("a")) == ((0, 1), 3)
    pool.append("a", 2)
    assert pool.table("a") == (0, 1, 3)
    pool.truncate("a", 0)
    assert (pool.table("a"), pool.available_count) == ((), 4)
    pool.check()


def test_a_truncated_block_loses_its_name_when_it_is_written_again():
    pool = BlockPool(num_blocks=4, block_size=2)
    fill(pool, "a", [1, 2, 3, 4])
    pool.truncate("a", 3)
    assert pool.lookup([1, 2, 3, 4, 0]) == 4, "nobody has overwritten it yet"
    pool.append("a", 1)
    assert pool.lookup([1, 2, 3, 4, 0]) == 2
    pool.seal("a", [1, 2, 3, 9], 4)
    assert pool.lookup([1, 2, 3, 9, 0]) == 4
    pool.check()


def test_a_truncated_block_that_others_read_is_copied():
    pool = BlockPool(num_blocks=4, block_size=2)
    fill(pool, "a", [1, 2, 3, 4])
    pool.fork("a", "b")
    pool.truncate("a", 3)
    assert pool.append("a", 1) == Append(((1, 2),))
    assert (pool.table("a"), pool.table("b")) == ((0, 2), (0, 1))
    assert pool.lookup([1, 2, 3, 4, 0]) == 4, "b's block keeps its name and content"
    pool.check()


def test_export_gives_the_blocks_of_a_range():
    pool = BlockPool(num_blocks=4, block_size=2)
    fill(pool, "a", ids(7))
    assert pool.export("a", 0, 7) == (0, 1, 2, 3)
    assert pool.export("a", 2, 5) == (1, 2)
    assert pool.export("a", 4, 4) == ()


def test_misuse_is_told_in_words():
    pool = BlockPool(num_blocks=4, block_size=2)
    pool.new("a", ids(4))
    pool.append("a", 4)
    with pytest.raises(AssertionError, match="a already has a table; two requests would share one"):
        pool.new("a")
    with pytest.raises(AssertionError, match="a already has a table"):
        pool.fork("a", "a")
    with pytest.raises(AssertionError, match=r"a: 5 tokens cannot be written, 0 were and 4 are reserved"):
        pool.seal("a", ids(5), 5)
    with pytest.raises(AssertionError, match=r"a holds 4 tokens, cannot keep 5"):
        pool.truncate("a", 5)
    with pytest.raises(AssertionError, match=r"a: token 1 is not written yet and must not be sent"):
        pool.export("a", 0, 2)
    with pytest.raises(AssertionError, match=r"an export starts at a block's first token, not at 1"):
        pool.export("a", 1, 2)
    with pytest.raises(AssertionError, match=r"a pool of 0 blocks of 2 tokens holds nothing"):
        BlockPool(0, 2)
    pool.check()


def test_blocks_for_rounds_up():
    pool = BlockPool(num_blocks=4, block_size=4)
    assert [pool.blocks_for(tokens) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_without_a_prefix_cache_nothing_is_remembered():
    pool = BlockPool(num_blocks=4, block_size=2, prefix_cache=False)
    fill(pool, "a", ids(4))
    pool.free("a")
    assert (pool.lookup(ids(4)), pool.cached_count, pool.available_count) == (0, 0, 4)


def test_an_idle_owner_checks_a_large_pool_seldom_and_still_finds_what_is_wrong():
    pool = BlockPool(1000, 4)
    pool.check_at_times(0.0)
    pool._refs[7] = 1
    pool.check_at_times(1.9)
    with pytest.raises(AssertionError, match="7"):
        pool.check_at_times(2.0)
