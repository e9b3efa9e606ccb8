"""The decode scheduler driven by hand: schedule, then complete, with tokens that the test makes up, and a memory that
knows what every KV slot holds."""

from __future__ import annotations

from dataclasses import replace

from decode_worker.config import DecodeConfig
from decode_worker.flight import DecodeBatch
from decode_worker.repeat import Repeat
from decode_worker.scheduler import DecodeScheduler, Emission
from decode_worker.sequence import Request, RequestState, Timeline
from decode_worker.stream import Delta, Submit
from engine.batch import PENDING_TOKEN, Batch, Row, Sampled, StepOutput
from engine.block_pool import BlockPool
from engine.emulated_runner import check_ownership
from engine.sampling import SamplingParams
from engine.step_cost import StepCost

EOS = 0
BLOCK = 4
MAX_CONTEXT = 200
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


class Memory:
    """Executes batches as a runner would, one after another, but stores each position's whole context in its slot.

    A row whose slots do not hold the context that its tokens continue has been given wrong blocks, or has had them
    taken away.
    """

    def __init__(self, num_blocks: int) -> None:
        self._slots: list[list[tuple[int, ...]]] = [[()] * BLOCK for _ in range(num_blocks)]
        self._drawn: list[int] = []

    def write(self, block_ids: tuple[int, ...], start: int, context: tuple[int, ...]) -> None:
        """Stores positions [start, len(context)) through a block table."""
        for position in range(start, len(context)):
            self._slots[block_ids[position // BLOCK]][position % BLOCK] = context[: position + 1]

    def read(self, block_ids: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """The context of the first `tokens` positions, each of which must hold it."""
        context = self._slots[block_ids[(tokens - 1) // BLOCK]][(tokens - 1) % BLOCK] if tokens else ()
        for position in range(tokens):
            held = self._slots[block_ids[position // BLOCK]][position % BLOCK]
            assert held == context[: position + 1], f"position {position} of {block_ids} holds {held}, not {context}"
        return context

    def execute(self, batch: DecodeBatch, drawn: dict[str, list[int]]) -> StepOutput:
        """`drawn`: the tokens that each sampling row draws, by the row's name."""
        check_ownership(batch.batch, BLOCK)
        for source, target in batch.batch.copies:
            self._slots[target] = list(self._slots[source])
        rows = [self._resolved(row) for row in batch.batch.rows]
        for row in rows:
            block_ids = tuple(row.block_ids)
            context = self.read(block_ids, row.start)
            self.write(block_ids, row.start, (*context, *row.token_ids))
        out = [drawn[row.seq_id][: len(row.sample.choices)] if row.sample else [] for row in rows]
        self._drawn = [token_id for each in out for token_id in each]
        return StepOutput(tuple(tuple(Sampled(token_id) for token_id in each) for each in out))

    def _resolved(self, row: Row) -> Row:
        if row.follows is None:
            return row
        assert row.token_ids == (PENDING_TOKEN,)
        return replace(row, token_ids=(self._drawn[row.follows],))


class Bench:
    """A scheduler, its pool and a memory. Time is the number of completed steps."""

    def __init__(self, num_blocks: int = 32, cost: StepCost | None = None, **limits: int) -> None:
        self.cost = cost
        self.pool = BlockPool(num_blocks, BLOCK)
        self.memory = Memory(num_blocks)
        self.scheduler = DecodeScheduler(self.pool, DecodeConfig(**limits), frozenset({EOS}), MAX_CONTEXT, cost)
        self.repeat: Repeat | None = None
        self.under_way: list[DecodeBatch] = []
        self.now = 0.0
        self._serial = 0
        self._ended: set[tuple[str, int]] = set()

    def submit(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams = GREEDY,
        *,
        pulled: bool = False,
        ttft_due_s: float | None = None,
        tpot_s: float | None = None,
    ) -> Request:
        self._serial += 1
        key = f"r{self._serial}"
        submit = Submit(key, prompt, params, 0, "p" if pulled else "", ttft_due_s=ttft_due_s, tpot_s=tpot_s)
        request = Request(key, self._serial, submit, None, Timeline(self.now))
        self.scheduler.submit(request, self.now)
        return request

    def receive(self, request: Request, first_tokens: tuple[int, ...]) -> list[Emission]:
        """All of a pulled request's life up to its choices' joining the batch. Its blocks must be free for it."""
        for started in self.scheduler.start_pulls():
            self.scheduler.began(started, started.have_tokens, 0)
        self.scheduler.grant(self.now)
        assert request.state is RequestState.RECEIVING, "there are no blocks for it"
        return self.arrive(request, first_tokens)

    def arrive(self, request: Request, first_tokens: tuple[int, ...]) -> list[Emission]:
        """KV comes into the blocks of a request that was granted them."""
        block_ids = self.pool.table(request.lead.owner)
        new = set(block_ids[request.have_tokens // BLOCK :])
        assert not new & self.named(), "KV is received into blocks that a step under way names"
        self.memory.write(block_ids, request.have_tokens, request.submit.token_ids)
        sampled = tuple(Sampled(token_id) for token_id in first_tokens)
        emissions = self.scheduler.first_tokens(request, sampled, self.now)
        self.scheduler.arrived(request, self.now)
        self._drop_finished(emissions)
        return emissions

    def schedule(self) -> DecodeBatch | None:
        batch = self.scheduler.schedule(self.now)
        if batch is not None:
            self.under_way.append(batch)
            if len(self.under_way) == 1:
                self.scheduler.starts(batch, self.now)
        return batch

    def complete(self, drawn: dict[str, list[int]]) -> list[Emission]:
        """Ends the oldest step."""
        batch = self.under_way.pop(0)
        self.now += 1.0
        emissions = self.scheduler.complete(batch, [self.memory.execute(batch, drawn)], self.now)
        if self.under_way:
            self.scheduler.starts(self.under_way[0], self.now)
        self._drop_finished(emissions)
        return emissions

    def schedule_run(self) -> DecodeBatch | None:
        """Schedules a step, and as many of its like as may follow; only while none is under way."""
        batch = self.schedule()
        self.repeat = None if batch is None else self.scheduler.repeat(batch)
        return batch

    def complete_run(self, steps: int, drawn: dict[str, list[int]]) -> list[Emission]:
        """Ends a repeated batch after `steps` steps; in each a row draws the next of its tokens."""
        assert self.repeat is not None
        batch, rows, outs = self.under_way.pop(), self.repeat.batch.rows, []
        for step in range(steps):
            tokens = {name: each[step:] for name, each in drawn.items()}
            copies = batch.batch.copies if step == 0 else ()
            single = replace(batch, batch=Batch(tuple(_until_end(row) for row in rows), copies))
            outs.append(self.memory.execute(single, tokens))
            rows = tuple(_next(row, tokens[row.seq_id][0]) for row in rows)
        self.now += float(steps)
        self.repeat = None
        emissions = self.scheduler.complete(batch, outs, self.now)
        self._drop_finished(emissions)
        return emissions

    def cancel(self, request: Request) -> None:
        self.scheduler.withdraw(request)
        self.scheduler.give_back(request)

    def named(self) -> set[int]:
        """Every block that a step under way reads or writes."""
        named: set[int] = set()
        for batch in self.under_way:
            # What later steps of a run use is nobody's until they are run.
            named |= {block_id for row in batch.batch.rows for block_id in row.block_ids}
            named |= {block_id for copy in batch.batch.copies for block_id in copy}
        return named

    def held(self) -> set[int]:
        return {block_id for owner in self.pool.owners for block_id in self.pool.table(owner)}

    def _drop_finished(self, emissions: list[Emission]) -> None:
        """As the worker's loop does. Nothing may come of a choice that has ended."""
        for request, event in emissions:
            if isinstance(event, Delta):
                choice = request.key, event.choice
                assert choice not in self._ended, f"{choice} goes on after its end"
                if event.finish_reason is not None:
                    self._ended.add(choice)
        for request in {request.key: request for request, _ in emissions}.values():
            if request.is_finished and not request.is_dropped:
                self.cancel(request)


def _until_end(row: Row) -> Row:
    return replace(row, block_ids=row.block_ids[: -(-row.end // BLOCK)])


def _next(row: Row, token_id: int) -> Row:
    assert row.sample is not None
    sample = replace(row.sample, step=row.sample.step + 1)
    return replace(row, token_ids=(token_id,), start=row.end, sample=sample)
