"""What the decode worker computes next, and who holds its blocks. Pure: values in, values out, `now` is an argument.

Every step takes one token of each running choice, and with what is left of the local token budget chunks of prompts
that are computed here. The states are in `sequence.py`.

Who may have blocks, when there are too few: running choices first, then the oldest of those that wait. A running choice
that cannot grow takes the blocks of the youngest one, which is recomputed later (preemption by recompute). A request
that waits while nothing runs takes the prefix that the youngest puller has pinned (demotion: that one is computed
here). So the oldest request always gets on, whatever the others hold.

A step may be scheduled while another is under way. It then goes on from tokens that are not drawn yet (`ahead.py`); a
choice that turns out to have ended has a row for nothing. Blocks go back in `schedule` and `complete`, once no step
under way may name them (`flight.py`), so preemption and demotion wait until there is none. All else may come any time.
"""

from __future__ import annotations

from decode_worker.ahead import going_on, most_blocks
from decode_worker.config import DecodeConfig
from decode_worker.flight import DecodeBatch, Flight, Reached
from decode_worker.rows import chunk_row, decode_row
from decode_worker.sequence import Choice, ChoiceState, Request, RequestState
from decode_worker.stream import Event
from engine.batch import Batch, Row, Sampled, StepOutput
from engine.block_pool import BlockPool
from engine.chunking import next_chunk
from engine.errors import InvalidArgument, Overloaded
from engine.slack_queue import SlackQueue

# An event, and the request that it belongs to.
Emission = tuple[Request, Event]
# Rows of a batch, and what copy-on-write owes before it.
Rows = list[tuple[Row, Choice]]
Copies = list[tuple[int, int]]


class DecodeScheduler:
    """Continuous batching over one block pool."""

    def __init__(self, pool: BlockPool, config: DecodeConfig, eos_token_ids: frozenset[int], max_context: int) -> None:
        self.pool = pool
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._max_context = max_context
        self._requests: dict[str, Request] = {}
        self._pull_queue: SlackQueue[Request] = SlackQueue()
        self._pulling: dict[str, Request] = {}
        self._waiting: list[Choice] = []  # COMPUTING, without blocks yet
        self._computing: list[Choice] = []  # COMPUTING, all blocks reserved
        self._running: list[Choice] = []
        self._flight = Flight(pool)

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """Requests whose prompt's KV is not there yet, and choices that wait to be recomputed."""
        return len(self._pull_queue) + len(self._pulling) + len(self._waiting) + len(self._computing)

    @property
    def queued_tokens(self) -> int:
        """Tokens that are to be computed here and are not yet."""
        return sum(len(choice.token_ids) - choice.computed for choice in (*self._waiting, *self._computing))

    @property
    def is_empty(self) -> bool:
        return not (self._requests or self._flight.is_anybody_leaving)

    # ── a request comes, and gets its prompt's KV ────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, now: float) -> None:
        """Raises InvalidArgument for what can never fit, Overloaded when too many are unfinished."""
        tokens = len(request.submit.token_ids) + request.submit.params.max_tokens
        need = self.pool.blocks_for(min(tokens, self._max_context))
        if need > self.pool.num_blocks:
            limit = self.pool.num_blocks * self.pool.block_size
            raise InvalidArgument("prompt + max_tokens", f"{tokens} tokens", f"at most {limit} on this worker")
        if len(self._requests) >= self._config.max_queued:
            raise Overloaded(f"{len(self._requests)} requests are unfinished on this decode worker")
        self._requests[request.key] = request
        if request.submit.prefill_address:
            self._pull_queue.push(request.key, request, now, request.deadline_s)
        else:
            self._compute_here(request)

    def start_pulls(self) -> list[Request]:
        """Requests whose KV stream is to be opened now; each has pinned what the local cache holds of its prompt."""
        started: list[Request] = []
        while self._pull_queue and len(self._pulling) < self._config.max_transfers:
            request = self._pull_queue.pop()
            request.move(RequestState.PULLING)
            submit = request.submit
            request.have_tokens = self.pool.new(request.lead.owner, submit.token_ids, submit.salt)
            self._pulling[request.key] = request
            started.append(request)
        return started

    def began(self, request: Request, first_token: int, cached_tokens: int) -> None:
        """The stream's first frame is here: KV from `first_token` on will come. Now the request wants blocks."""
        request.move(RequestState.RESERVING)
        self.pool.truncate(request.lead.owner, first_token)
        request.cached_tokens = max(request.have_tokens, cached_tokens)

    def grant(self) -> list[Request]:
        """Reserves whole prompts for those that wait for it, oldest first; returns who may read on."""
        granted: list[Request] = []
        for request in self._reserving():
            missing = self._missing(request)
            appended = self.pool.append(request.lead.owner, missing) if self._fits(missing) else None
            if appended is None:
                break
            # Received KV starts on a block's boundary: both sides' block sizes are powers of two.
            assert not appended.copies, f"{request.key} would receive into a block that others read"
            request.move(RequestState.RECEIVING)
            granted.append(request)
        return granted

    def first_tokens(self, request: Request, sampled: tuple[Sampled, ...], now: float) -> list[Emission]:
        """The prompt's first output tokens, one per choice; they go out before the KV is complete."""
        request.times.first_token_s = now
        events: list[Emission] = []
        for choice, drawn in zip(request.choices, sampled, strict=True):
            events += self._add(choice, drawn, now)
        return events

    def arrived(self, request: Request, now: float) -> None:
        """All of the prompt's KV is in the lead's blocks: the choices fork it and join the running batch."""
        request.move(RequestState.ACTIVE)
        self._pulling.pop(request.key, None)
        request.times.kv_ready_s = now
        lead, prompt = request.lead, request.submit.token_ids
        self.pool.seal(lead.owner, prompt, len(prompt))
        for choice in request.choices:
            if choice.state is ChoiceState.FINISHED:
                continue
            if choice is not lead:
                self.pool.fork(lead.owner, choice.owner)
            self._run(choice)
        if lead.state is ChoiceState.FINISHED:
            self._flight.leave(lead.owner)

    def withdraw(self, request: Request) -> None:
        """The request ends, finished or not: nothing more is computed for it. Its blocks stay until `give_back`."""
        request.is_dropped = True
        self._requests.pop(request.key, None)
        self._pull_queue.remove(request.key)
        self._pulling.pop(request.key, None)
        for group in (self._waiting, self._computing, self._running):
            group[:] = [choice for choice in group if choice.request is not request]

    def give_back(self, request: Request) -> None:
        """A withdrawn request's blocks, into which no KV is received any more, go back after the steps under way."""
        for choice in request.choices:
            self._flight.leave(choice.owner)

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> DecodeBatch | None:
        """The next batch, None when there is nothing to compute, or nothing yet. At most one other may be under way,
        returned from here and not yet completed; this one runs after it."""
        self._flight.release()
        reached = self._flight.reached()
        copies: Copies = []
        rows = self._rows_ahead(reached, copies) if self._flight.is_under_way else self._decode_rows(copies)
        if rows is None:
            return None
        self._admit()
        rows += self._chunk_rows(reached)
        if not rows:
            return None
        batch = DecodeBatch(Batch(tuple(row for row, _ in rows), tuple(copies)), tuple(choice for _, choice in rows))
        self._flight.launch(batch)
        return batch

    def starts(self, batch: DecodeBatch, now: float) -> None:
        """Takes down that a scheduled step starts to run: at once, or when the one before it has been completed."""
        for choice in batch.choices:
            if choice.state is ChoiceState.RUNNING:
                choice.request.times.decode_starts(now)
        for choice in self._computing:
            choice.request.times.compute_starts(now)

    def complete(self, batch: DecodeBatch, out: StepOutput, now: float) -> list[Emission]:
        """Books the oldest step under way, which has ended; returns the tokens that it gave. Requests that left
        meanwhile, and choices that had ended before, are passed over: their KV is never named in the prefix cache."""
        self._flight.land(batch)
        events: list[Emission] = []
        for row, choice, sampled in zip(batch.batch.rows, batch.choices, out.sampled, strict=True):
            if choice.request.is_dropped or choice.state is ChoiceState.FINISHED:
                continue
            choice.computed = row.end
            self.pool.seal(choice.owner, choice.token_ids, row.end)
            if not sampled:
                continue
            if choice.request.state is RequestState.LOCAL:
                self._computing.remove(choice)
                events += self.first_tokens(choice.request, sampled, now)
                self.arrived(choice.request, now)
                continue
            if choice.state is ChoiceState.COMPUTING:
                self._computing.remove(choice)
                self._run(choice)
            events += self._add(choice, sampled[0], now)
        self._flight.release()
        return events

    def make_room(self) -> list[Request]:
        """When everybody waits: takes back pinned prefixes, the youngest first, until the oldest can have its blocks.

        Call while no step is under way, after `grant`. Returns pulls to be closed; their requests are computed here.
        """
        assert not self._flight.is_under_way, "somebody may have blocks after the step under way"
        demoted: list[Request] = []
        while self._is_stuck():
            oldest = min(self._needy(), key=lambda request: request.serial)
            holders = [request for request in self._pulling.values() if request is not oldest]
            if not holders:
                break
            youngest = max(holders, key=lambda request: request.serial)
            del self._pulling[youngest.key]
            # A puller without a grant writes to none of its blocks, so they can go back at once.
            self.pool.free(youngest.lead.owner)
            youngest.have_tokens = 0
            youngest.preemptions += 1
            self._compute_here(youngest)
            demoted.append(youngest)
            self._admit()
        return demoted

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _needy(self) -> list[Request]:
        return self._reserving() + [choice.request for choice in self._waiting]

    def _is_stuck(self) -> bool:
        """True when somebody waits for blocks, nobody can have them, and nobody is going to give any back."""
        if self._running or self._computing or self._flight.is_anybody_leaving or not self._needy():
            return False
        if any(request.state is RequestState.RECEIVING for request in self._pulling.values()):
            return False
        reserving = self._reserving()
        return not (reserving and self._fits(self._missing(reserving[0])))

    def _reserving(self) -> list[Request]:
        waiting = [request for request in self._pulling.values() if request.state is RequestState.RESERVING]
        return sorted(waiting, key=lambda request: request.serial)

    def _missing(self, request: Request) -> int:
        """Prompt tokens for which a reserving request has no blocks yet."""
        held = len(self.pool.table(request.lead.owner)) * self.pool.block_size
        return request.lead.prompt_tokens - held

    def _fits(self, tokens: int) -> bool:
        """Room for a newcomer: what it needs, and a block for each running choice, lest they preempt it at once."""
        return self.pool.blocks_for(tokens) + len(self._running) <= self.pool.available_count

    def _compute_here(self, request: Request) -> None:
        request.move(RequestState.LOCAL)
        request.lead.move(ChoiceState.COMPUTING)
        self._waiting.append(request.lead)

    def _run(self, choice: Choice) -> None:
        choice.move(ChoiceState.RUNNING)
        choice.computed = self.pool.filled(choice.owner)
        self._running.append(choice)

    def _preempt(self, choice: Choice) -> None:
        assert not self._flight.is_under_way, f"{choice.owner} would lose blocks that a step under way may use"
        self._running.remove(choice)
        self.pool.free(choice.owner)
        choice.move(ChoiceState.COMPUTING)
        choice.computed = 0
        choice.request.preemptions += 1
        self._waiting.append(choice)

    def _decode_rows(self, copies: Copies) -> Rows:
        rows: Rows = []
        self._running.sort(key=Choice.age)
        while len(rows) < min(len(self._running), self._config.max_batch):
            row = self._decode_row(self._running[len(rows)], None, copies)
            if row is None:
                # The youngest gives way. It comes after this one, or is this one: rows made so far stay valid.
                self._preempt(self._running[-1])
            else:
                rows.append(row)
        return rows

    def _rows_ahead(self, reached: dict[Choice, Reached], copies: Copies) -> Rows | None:
        choices = going_on(self._running, self._computing, reached, self._max_context)
        if choices is None:
            return None
        del choices[self._config.max_batch :]
        if most_blocks(choices, reached, self.pool.block_size) > self.pool.available_count:
            return None
        rows: Rows = []
        for choice in choices:
            row = self._decode_row(choice, reached.get(choice), copies)
            assert row is not None, f"{choice.owner} takes a block more than was reckoned with"
            rows.append(row)
        return rows

    def _decode_row(self, choice: Choice, reached: Reached | None, copies: Copies) -> tuple[Row, Choice] | None:
        """None when the choice needs a block and there is none."""
        appended = self.pool.append(choice.owner, 1)
        if appended is None:
            return None
        copies += appended.copies
        return decode_row(choice, self.pool.table(choice.owner), reached), choice

    def _admit(self) -> None:
        """Gives blocks to choices that are to be computed here, oldest first, all that they need at once."""
        self._waiting.sort(key=Choice.age)
        while self._waiting:
            choice = self._waiting[0]
            cached = self.pool.new(choice.owner, choice.token_ids, choice.request.submit.salt)
            missing = len(choice.token_ids) - cached
            if not self._fits(missing) or self.pool.append(choice.owner, missing) is None:
                self.pool.free(choice.owner)
                return
            choice.computed = cached
            if not choice.request.times.is_prompt_started:
                choice.request.cached_tokens = cached
            self._computing.append(self._waiting.pop(0))

    def _chunk_rows(self, reached: dict[Choice, Reached]) -> Rows:
        budget = self._config.local_token_budget
        rows: Rows = []
        for choice in self._computing:
            start = reached[choice].end if choice in reached else choice.computed
            count = next_chunk(start, len(choice.token_ids), budget, self.pool.block_size)
            if count:
                rows.append((chunk_row(choice, self.pool.table(choice.owner), start, count), choice))
                budget -= count
        return rows

    def _add(self, choice: Choice, drawn: Sampled, now: float) -> list[Emission]:
        request = choice.request
        request.times.last_token_s = now
        delta = choice.add(drawn, self._eos_token_ids, self._max_context)
        if choice.finish_reason is None:
            return [(request, delta)]
        if choice.state is ChoiceState.RUNNING:
            self._running.remove(choice)
            self._flight.leave(choice.owner)
        choice.move(ChoiceState.FINISHED)
        return [(request, delta), (request, request.done())] if request.is_finished else [(request, delta)]
