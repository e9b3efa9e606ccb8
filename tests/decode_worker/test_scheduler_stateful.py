"""The decode scheduler under everything at once, in any order, with up to two steps under way, or a run of several.

The memory of `by_hand.py` says whether each row reads the context that it continues. Beside that, nothing that a step
under way names is ever free, what the prefix cache hands out holds what it is named after, and in the end all is empty.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from decode_worker.sequence import ChoiceState, Request, RequestState
from tests.decode_worker.by_hand import BLOCK, EOS, GREEDY, Bench
from tests.planning.linear_cost import LinearCost

NUM_BLOCKS = 14
# Few tokens and few prompts, so that prefixes are shared; 0 ends a sequence.
TOKENS = (EOS, 1, 2, 2, 3)
PROMPTS = [tuple(1 + (index * index + variant * (index > 7)) % 3 for index in range(17)) for variant in range(2)]


class Scheduling(RuleBasedStateMachine):
    @initialize(max_batch=st.sampled_from([2, 8]), budget=st.sampled_from([3, 8, 32]), has_cost=st.booleans())
    def begin(self, max_batch: int, budget: int, has_cost: bool) -> None:
        # A step is a second here; with several rows it takes longer than some objectives allow.
        cost = LinearCost(fixed_s=0.5, token_s=0.1, row_s=0.2, context_s=0.0, saturation_tokens=8) if has_cost else None
        self.desk = Bench(NUM_BLOCKS, cost, max_batch=max_batch, local_token_budget=budget, max_steps=16)
        self.requests: list[Request] = []

    @rule(
        prompt=st.sampled_from(PROMPTS),
        length=st.integers(1, 17),
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.integers(1, 20),
        pulled=st.booleans(),
        penalised=st.sampled_from([False, False, False, True]),
        ignore_eos=st.booleans(),
        objectives=st.sampled_from([(None, None), (1.0, None), (9.0, 0.8), (9.0, 1.5), (None, 5.0)]),
    )
    def submit(
        self,
        prompt: tuple[int, ...],
        length: int,
        n: int,
        max_tokens: int,
        pulled: bool,
        penalised: bool,
        ignore_eos: bool,
        objectives: tuple[float | None, float | None],
    ) -> None:
        params = replace(GREEDY, n=n, max_tokens=max_tokens, frequency_penalty=0.5 * penalised, ignore_eos=ignore_eos)
        ttft_due_s, tpot_s = objectives
        request = self.desk.submit(prompt[:length], params, pulled=pulled, ttft_due_s=ttft_due_s, tpot_s=tpot_s)
        self.requests.append(request)

    @precondition(lambda self: len(self.desk.under_way) < 2 and self.desk.repeat is None)
    @rule(may_repeat=st.booleans())
    def schedule(self, may_repeat: bool) -> None:
        batch = self.desk.schedule_run() if may_repeat and not self.desk.under_way else self.desk.schedule()
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
        if self.desk.repeat is not None:
            self.end_run(draws)
            return
        self.desk.complete({row.seq_id: [next(each, 1) for _ in range(3)] for row in batch.batch.rows})

    def end_run(self, draws: list[int]) -> None:
        """As many steps as are asked for by the draws, or as there had to be when somebody took blocks."""
        desk, repeat = self.desk, self.desk.repeat
        assert repeat is not None
        steps = min(self.settled_steps or 1 + draws.index(max(draws)), repeat.max_steps)
        self.settled_steps = 0
        names = [row.seq_id for row in repeat.batch.rows]
        desk.complete_run(steps, dict.fromkeys(names, draws[-16:]))

    settled_steps = 0

    def settle(self) -> None:
        """What the loop does before blocks are taken while a run is under way: half of its steps will have been run."""
        if self.desk.repeat is not None and not self.settled_steps:
            self.settled_steps = 1 + self.desk.repeat.max_steps // 2
            self.desk.scheduler.settle(self.desk.under_way[0], self.settled_steps)

    @rule(data=st.data())
    def pull(self, data: st.DataObject) -> None:
        """Streams open and begin; one whose blocks are granted delivers all its KV at once."""
        if self.desk.repeat is None:
            # The loop opens streams between steps only.
            self.desk.scheduler.start_pulls()
        self.begin_all()
        self.grant_and_arrive(data)

    def begin_all(self) -> None:
        self.settle()
        for request in self.unfinished():
            if request.state is RequestState.PULLING:
                self.desk.scheduler.began(request, request.have_tokens, 0)

    def grant_and_arrive(self, data: st.DataObject) -> None:
        self.desk.scheduler.grant(self.desk.now)
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
        self.desk.scheduler.make_room(self.desk.now)

    @invariant()
    def steps_under_way_keep_their_blocks(self) -> None:
        if not hasattr(self, "desk"):
            return
        self.desk.pool.check()
        assert self.desk.named() <= self.desk.held()

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "desk"):
            return
        scheduler = self.desk.scheduler
        choices = [choice for request in self.unfinished() for choice in request.choices]
        computing = [choice for choice in choices if choice.state is ChoiceState.COMPUTING]
        assert scheduler.queued_tokens == sum(len(choice.token_ids) - choice.computed for choice in computing)
        assert (scheduler.queued_s > 0) == (self.desk.cost is not None and scheduler.queued_tokens > 0)
        assert scheduler.running_count == sum(choice.state is ChoiceState.RUNNING for choice in choices)

    @invariant()
    def cached_blocks_hold_their_names(self) -> None:
        if not hasattr(self, "desk") or (self.desk.repeat is not None and not self.settled_steps):
            # A run writes blocks that are not taken yet: nobody may look before they are.
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
        if desk.repeat is not None:
            self.end_run([1] * 24)
        while desk.under_way:
            desk.complete({row.seq_id: [1, 2, 3] for row in desk.under_way[0].batch.rows})
        # Whatever was in the middle of anything comes to its end.
        for _ in range(NUM_BLOCKS * BLOCK * 40):
            if not self.unfinished():
                break
            if desk.schedule() is None and not desk.under_way:
                desk.scheduler.start_pulls()
                self.begin_all()
                desk.scheduler.grant(desk.now)
                receiving = [request for request in self.unfinished() if request.state is RequestState.RECEIVING]
                for request in receiving:
                    desk.arrive(request, (1,) * len(request.choices))
                if not receiving:
                    desk.scheduler.make_room(desk.now)
            while desk.under_way:
                desk.complete({row.seq_id: [1, 2, 3] for row in desk.under_way[0].batch.rows})
        assert not self.unfinished(), f"{[request.key for request in self.unfinished()]} never end"
        desk.schedule()
        desk.pool.check()
        assert desk.scheduler.is_empty
        assert not desk.pool.owners


class Repeating(Scheduling):
    """Requests whose steps can be repeated, as often as they can be: what the other one rarely comes to."""

    @rule(
        prompt=st.sampled_from(PROMPTS),
        length=st.integers(1, 17),
        max_tokens=st.integers(2, 20),
        n=st.sampled_from([1, 1, 2]),
        first=st.lists(st.sampled_from(TOKENS), min_size=2, max_size=2),
    )
    def submit(self, prompt: tuple[int, ...], length: int, max_tokens: int, n: int, first: list[int]) -> None:  # type: ignore[override]
        params = replace(GREEDY, n=n, max_tokens=max_tokens, ignore_eos=True)
        self.requests.append(self.desk.submit(prompt[:length], params, pulled=True))
        if self.desk.repeat is None:
            self.desk.scheduler.start_pulls()
            if prompt[0] == 1 and length % 2:
                return  # It begins later, perhaps while others run.
        self.begin_all()
        for request in self.desk.scheduler.grant(self.desk.now):
            self.desk.arrive(request, tuple(first[: len(request.choices)]))

    @precondition(lambda self: not self.desk.under_way)
    @rule()
    def schedule(self) -> None:  # type: ignore[override]
        self.desk.schedule_run()


TestScheduling = Scheduling.TestCase
TestRepeating = Repeating.TestCase
