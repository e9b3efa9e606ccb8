"""Who has blocks first, of those who wait for them: prompts that are pulled and prompts that are computed here."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.planning import virtual_loop
from decode_worker.sequence import ChoiceState, Request, RequestState
from decode_worker.stream import Done
from engine.sampling import SamplingParams
from kvtransfer.frames import KVBlocks
from tests.decode_worker.by_hand import BLOCK, GREEDY, Bench
from tests.decode_worker.scripted import scene
from tests.emulated import submit

ONE = replace(GREEDY, max_tokens=1)


def prompt(blocks: int, first: int = 1) -> tuple[int, ...]:
    """One token less than fills so many blocks, of others than any other prompt."""
    return (first, *([2] * (BLOCK * blocks - 2)))


def begin(bench: Bench) -> None:
    """Every stream that may be open has begun."""
    for request in bench.scheduler.start_pulls():
        bench.scheduler.began(request, request.have_tokens, 0)


def states(*requests: Request) -> list[RequestState]:
    return [request.state for request in requests]


def test_newcomers_computed_here_wait_for_an_older_pull() -> None:
    """Else small ones, one after the other, would keep a large one waiting for ever."""
    bench = Bench(12)
    first = bench.submit(prompt(6, 3), GREEDY, pulled=True)
    bench.receive(first, (1,))
    big = bench.submit(prompt(9, 4), ONE, pulled=True)
    small = bench.submit(prompt(1, 5), ONE)
    begin(bench)
    assert bench.scheduler.grant(bench.now) == []
    for _ in range(3):
        batch = bench.schedule()
        assert batch is not None
        assert len(batch.choices) == 1, "there is room for the small one, but it is not its turn"
        bench.complete({"r1/0": [1]})
        assert bench.scheduler.grant(bench.now) == []
    bench.cancel(first)
    bench.schedule()
    assert bench.scheduler.grant(bench.now) == [big]
    assert bench.schedule() is not None
    assert bench.under_way[-1].choices == (small.lead,)


def test_newcomers_that_are_pulled_wait_for_an_older_prompt_here() -> None:
    bench = Bench(12)
    first = bench.submit(prompt(6, 3), GREEDY, pulled=True)
    bench.receive(first, (1,))
    big = bench.submit(prompt(9, 4), ONE)
    small = bench.submit(prompt(1, 5), ONE, pulled=True)
    begin(bench)
    bench.schedule()
    assert bench.scheduler.grant(bench.now) == []
    bench.complete({"r1/0": [1]})
    bench.cancel(first)
    assert bench.scheduler.grant(bench.now) == []
    batch = bench.schedule()
    assert batch is not None
    assert batch.choices == (big.lead,)
    assert bench.scheduler.grant(bench.now) == [small]


def test_a_pull_need_not_wait_where_there_is_room_for_the_older_one_too() -> None:
    """A prompt that came during a step gets its blocks after it; a pull's first token would wait as long."""
    bench = Bench(12)
    here = bench.submit(prompt(4, 3), ONE)
    pulled = bench.submit(prompt(4, 4), ONE, pulled=True)
    begin(bench)
    assert bench.scheduler.grant(bench.now) == [pulled]
    assert here.lead.state is ChoiceState.COMPUTING
    assert bench.schedule() is not None


def test_a_pull_that_has_not_begun_holds_nobody_up() -> None:
    bench = Bench(12)
    bench.submit(prompt(11, 3), ONE, pulled=True)
    assert len(bench.scheduler.start_pulls()) == 1
    small = bench.submit(prompt(1, 4), ONE)
    batch = bench.schedule()
    assert batch is not None
    assert batch.choices == (small.lead,)


def test_who_was_preempted_goes_before_a_pull() -> None:
    """Its client reads already."""
    bench = Bench(12)
    older = bench.submit(prompt(5, 3), GREEDY, pulled=True)
    bench.receive(older, (1,))
    big = bench.submit(prompt(9, 4), ONE, pulled=True)
    younger = bench.submit(prompt(5, 5), GREEDY, pulled=True)
    begin(bench)
    # As if the large one's word had come later.
    big.state = RequestState.PULLING
    assert bench.scheduler.grant(bench.now) == [younger]
    bench.arrive(younger, (1,))
    big.state = RequestState.RESERVING
    while not younger.preemptions:
        batch = bench.schedule()
        assert batch is not None
        bench.complete({row.seq_id: [1] for row in batch.batch.rows})
    bench.cancel(older)
    batch = bench.schedule()
    assert batch is not None
    assert batch.choices == (younger.lead,)
    assert bench.scheduler.grant(bench.now) == []


def test_only_pulls_that_have_pinned_something_give_way() -> None:
    """Taking any other one out would compute its prompt here, and give nobody a block."""
    bench = Bench(16)
    kept = {first: prompt(12, first) for first in (3, 4)}
    for token_ids in kept.values():
        # Leaves a prefix of five blocks in the cache.
        begun = bench.submit(token_ids[: 5 * BLOCK], ONE, pulled=True)
        bench.receive(begun, (1,))
        bench.schedule()
    older, younger = (bench.submit(token_ids, ONE, pulled=True) for token_ids in kept.values())
    others = [bench.submit((5, 6, 7, first), ONE, pulled=True) for first in range(3)]
    begin(bench)
    assert bench.scheduler.grant(bench.now) == []
    assert bench.scheduler.make_room(bench.now) == [younger]
    assert bench.scheduler.grant(bench.now) == [older]
    assert states(*others) == [RequestState.RESERVING] * 3


@pytest.mark.parametrize("address", ["", "p"])
@pytest.mark.parametrize("big_address", ["", "p"])
def test_a_large_request_among_small_ones_is_served(address: str, big_address: str) -> None:
    async def run() -> int:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        async with scene(num_blocks=20, max_queued=400) as (_, _, gateway, _):
            for number in range(200):
                gateway.send(submit([number % 90, *range(1, 8)], f"s{number}", params=params, prefill_address=address))
                if number == 3:
                    gateway.send(submit([9] * 44, "big", params=params, prefill_address=big_address))
                await asyncio.sleep(0.05)
            await asyncio.sleep(60)
        done = [event.request_id for event in gateway.events if isinstance(event, Done)]
        assert len(done) == 201
        return done.index("big")

    assert virtual_loop.run(run()) < 10


def test_a_prompt_here_does_not_wait_for_the_kv_of_the_pull_before_it() -> None:
    """Only for that one's blocks: when it has them nobody sends the loop another word."""

    async def run() -> None:
        async with scene(num_blocks=20) as (transport, _, gateway, _):
            transport.hold = KVBlocks
            params = SamplingParams(temperature=0.0, max_tokens=2)
            filling = replace(params, max_tokens=30, ignore_eos=True)
            gateway.send(submit([8] * 40, "first", params=filling))
            await asyncio.sleep(0.05)
            gateway.send(submit([9] * 44, "pulled", params=params, prefill_address="p"))
            await asyncio.sleep(0.05)
            gateway.send(submit([7] * 8, "here", params=params))
            await asyncio.sleep(30)
            assert [event.request_id for event in gateway.events if isinstance(event, Done)] == ["first", "here"]

    virtual_loop.run(run())
