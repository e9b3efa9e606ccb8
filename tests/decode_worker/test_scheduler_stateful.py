"""The decode scheduler under everything at once, in any order, with up to two steps under way.

The memory of `by_hand.py` says whether each row reads the context that it continues. Beside that, nothing that a step
under way names is ever free, what the prefix cache hands out holds what it is named after, and in the end all is empty.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from decode_worker.sequence import Request, RequestState
from tests.decode_worker.by_hand import BLOCK, EOS, GREEDY, Bench

NUM_BLOCKS = 14
# Few tokens and few prompts, so that prefixes are shared; 0 ends a sequence.
TOKENS = (EOS, 1, 2, 2, 3)
PROMPTS = [tuple(1 + (index * index + variant * (index > 7)) % 3 for index in range(17)) for variant in range(2)]


class Scheduling(RuleBasedStateMachine):
    @initialize(max_batch=st.sampled_from([2, 8]), budget=st.sampled_from([3, 8, 32]))
    def begin(self, max_batch: int, budget: int) -> None:
        self.desk = Bench(NUM_BLOCKS, max_batch=max_batch, local_token_budget=budget)
        self.requests: list[Request] = []

    @rule(
        prompt=st.sampled_from(PROMPTS),
        length=st.integers(1, 17),
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.integers(1, 20),
        pulled=st.booleans(),
        penalised=st.sampled_from([False, False, False, True]),
    )
    def submit(
        self, prompt: tuple[int, ...], length: int, n: int, max_tokens: int, pulled: bool, penalised: bool
    ) -> None:
        params = replace(GREEDY, n=n, max_tokens=max_tokens, frequency_penalty=0.5 * penalised)
        self.requests.append(self.desk.submit(prompt[:length], params, pulled=pulled))

    @precondition(lambda self: len(self.desk.under_way) < 2)
    @rule()
    def schedule(self) -> None:
        batch = self.desk.schedule()
        if batch is None:
            return
        assert len(batch.batch.rows) > 0
        for choice, row in zip(batch.choices, batch.batch.rows, strict=True):
            assert not choice.request.is_dropped
            assert choice.finish_reason is None
            if row.follows is not None:
                assert row.sample is not None
                assert not row.sample.params.needs_history

    @precondition(lambda self: self.desk.under_way)
    @rule(draws=st.lists(st.sampled_from(TOKENS), min_size=24, max_size=24))
    def complete(self, draws: list[int]) -> None:
        each = iter(draws)
        batch = self.desk.under_way[0]
        self.desk.complete({row.seq_id: [next(each, 1) for _ in range(3)] for row in batch.batch.rows})

    @rule(data=st.data())
    def pull(self, data: st.DataObject) -> None:
        """Streams begin; one whose blocks are granted delivers all its KV at once."""
        for request in self.desk.scheduler.start_pulls():
            self.desk.scheduler.began(request, request.have_tokens, 0)
        self.desk.scheduler.grant()
        receiving = [request for request in self.unfinished() if request.state is RequestState.RECEIVING]
        if receiving:
            request = data.draw(st.sampled_from(receiving))
            first = st.lists(st.sampled_from(TOKENS), min_size=len(request.choices), max_size=len(request.choices))
            self.desk.arrive(request, tuple(data.draw(first)))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if unfinished := self.unfinished():
            self.desk.cancel(data.draw(st.sampled_from(unfinished)))

    @precondition(lambda self: not self.desk.under_way)
    @rule()
    def make_room(self) -> None:
        self.desk.scheduler.make_room()

    @invariant()
    def steps_under_way_keep_their_blocks(self) -> None:
        if not hasattr(self, "desk"):
            return
        self.desk.pool.check()
        assert self.desk.named() <= self.desk.held()

    @invariant()
    def cached_blocks_hold_their_names(self) -> None:
        if not hasattr(self, "desk"):
            return
        for number, prompt in enumerate(PROMPTS):
            longer = (*prompt, 1)
            owner = f"probe {number}"
            tokens = self.desk.pool.new(owner, longer)
            assert self.desk.memory.read(self.desk.pool.table(owner), tokens) == longer[:tokens]
            self.desk.pool.free(owner)

    def unfinished(self) -> list[Request]:
        return [request for request in self.requests if not request.is_dropped]

    def teardown(self) -> None:
        if not hasattr(self, "desk"):
            return
        desk = self.desk
        while desk.under_way:
            desk.complete({row.seq_id: [1, 2, 3] for row in desk.under_way[0].batch.rows})
        # Whatever was in the middle of anything comes to its end.
        for _ in range(NUM_BLOCKS * BLOCK * 40):
            if not self.unfinished():
                break
            if desk.schedule() is None and not desk.under_way:
                for request in desk.scheduler.start_pulls():
                    desk.scheduler.began(request, request.have_tokens, 0)
                desk.scheduler.grant()
                receiving = [request for request in self.unfinished() if request.state is RequestState.RECEIVING]
                for request in receiving:
                    desk.arrive(request, (1,) * len(request.choices))
                if not receiving:
                    desk.scheduler.make_room()
            while desk.under_way:
                desk.complete({row.seq_id: [1, 2, 3] for row in desk.under_way[0].batch.rows})
        assert not self.unfinished(), f"{[request.key for request in self.unfinished()]} never end"
        desk.schedule()
        desk.pool.check()
        assert desk.scheduler.is_empty
        assert not desk.pool.owners


TestScheduling = Scheduling.TestCase
