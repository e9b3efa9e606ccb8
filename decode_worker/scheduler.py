"""What the decode worker computes next, and who holds its blocks. Pure: values in, values out, `now` is an argument.

Every step takes one token of each running choice, and with what is left of the local token budget chunks of prompts
that are computed here. The states are in `sequence.py`.

Who may have blocks, when there are too few: running choices first, then the oldest of those that wait. A running choice
that cannot grow takes the blocks of the youngest one, which is recomputed later (preemption by recompute). A request
that waits while nothing runs takes the prefix that the youngest puller has pinned (demotion: that one is computed
here). So the oldest request always gets on, whatever the others hold.

Blocks are given back only in `schedule`, between steps; everything else may be called while a step runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from decode_worker.config import DecodeConfig
from decode_worker.sequence import Choice, ChoiceState, Request, RequestState
from decode_worker.stream import Delta, Done, Event
from engine.batch import Batch, Row, Sampled, SampleSpec, StepOutput
from engine.block_pool import BlockPool
from engine.chunking import next_chunk
from engine.errors import InvalidArgument, Overloaded
from engine.slack_queue import SlackQueue

# An event, and the request that it belongs to.
Emission = tuple[Request, Event]


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """What to run, and whose rows they are, in row order."""

    batch: Batch
    choices: tuple[Choice, ...]


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
        self._leaving: list[str] = []  # table owners to be freed between steps

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
        return not (self._requests or self._leaving)

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
            self._leaving.append(lead.owner)

    def withdraw(self, request: Request) -> None:
        """The request ends, finished or not: nothing more is computed for it. Its blocks stay until `give_back`."""
        request.is_dropped = True
        self._requests.pop(request.key, None)
        self._pull_queue.remove(request.key)
        self._pulling.pop(request.key, None)
        for group in (self._waiting, self._computing, self._running):
            group[:] = [choice for choice in group if choice.request is not request]

    def give_back(self, request: Request) -> None:
        """A withdrawn request's blocks, which nobody writes any more, go back at the next `schedule`."""
        self._leaving += [choice.owner for choice in request.choices]

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def release(self) -> None:
        """Gives back the blocks of whoever has left. Only between steps."""
        for owner in self._leaving:
            if self.pool.owns(owner):
                self.pool.free(owner)
        self._leaving.clear()

    def schedule(self, now: float) -> DecodeBatch | None:
        """The next batch, None when there is nothing to compute. Call only between steps."""
        self.release()
        copies: list[tuple[int, int]] = []
        rows = self._decode_rows(copies, now)
        self._admit(now)
        rows += self._chunk_rows()
        if not rows:
            return None
        return DecodeBatch(Batch(tuple(row for row, _ in rows), tuple(copies)), tuple(choice for _, choice in rows))

    def complete(self, batch: DecodeBatch, out: StepOutput, now: float) -> list[Emission]:
        """Books a finished step; returns the tokens that it gave. Requests that left meanwhile are passed over."""
        events: list[Emission] = []
        for row, choice, sampled in zip(batch.batch.rows, batch.choices, out.sampled, strict=True):
            if choice.request.is_dropped:
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
        return events

    def make_room(self, now: float) -> list[Request]:
        """When everybody waits: takes back pinned prefixes, the youngest first, until the oldest can have its blocks.

        Call between steps, after `grant`. Returns the pulls to be closed; those requests are computed here instead.
        """
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
            self._admit(now)
        return demoted

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _needy(self) -> list[Request]:
        return self._reserving() + [choice.request for choice in self._waiting]

    def _is_stuck(self) -> bool:
        """True when somebody waits for blocks, nobody can have them, and nobody is going to give any back."""
        if self._running or self._computing or self._leaving or not self._needy():
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
        self._running.remove(choice)
        self.pool.free(choice.owner)
        choice.move(ChoiceState.COMPUTING)
        choice.computed = 0
        choice.request.preemptions += 1
        self._waiting.append(choice)

    def _decode_rows(self, copies: list[tuple[int, int]], now: float) -> list[tuple[Row, Choice]]:
        rows: list[tuple[Row, Choice]] = []
        self._running.sort(key=lambda choice: (choice.request.serial, choice.index))
        position = 0
        while position < min(len(self._running), self._config.max_batch):
            choice = self._running[position]
            appended = self.pool.append(choice.owner, 1)
            if appended is None:
                # The youngest gives way. It comes after this one, or is this one: rows made so far stay valid.
                self._preempt(self._running[-1])
                continue
            copies += appended.copies
            times = choice.request.times
            times.first_step_s = now if times.first_step_s is None else times.first_step_s
            start = len(choice.token_ids) - 1
            rows.append((self._row(choice, start, choice.token_ids[start:]), choice))
            position += 1
        return rows

    def _admit(self, now: float) -> None:
        """Gives blocks to choices that are to be computed here, oldest first, all that they need at once."""
        self._waiting.sort(key=lambda choice: (choice.request.serial, choice.index))
        while self._waiting:
            choice = self._waiting[0]
            cached = self.pool.new(choice.owner, choice.token_ids, choice.request.submit.salt)
            missing = len(choice.token_ids) - cached
            if not self._fits(missing) or self.pool.append(choice.owner, missing) is None:
                self.pool.free(choice.owner)
                return
            choice.computed = cached
            request = choice.request
            if request.times.compute_started_s is None and request.times.first_token_s is None:
                request.times.compute_started_s = now
                request.cached_tokens = cached
            self._computing.append(self._waiting.pop(0))

    def _chunk_rows(self) -> list[tuple[Row, Choice]]:
        budget = self._config.local_token_budget
        rows: list[tuple[Row, Choice]] = []
        for choice in self._computing:
            count = next_chunk(choice.computed, len(choice.token_ids), budget, self.pool.block_size)
            if count:
                tokens = choice.token_ids[choice.computed : choice.computed + count]
                rows.append((self._row(choice, choice.computed, tokens), choice))
                budget -= count
        return rows

    def _row(self, choice: Choice, start: int, tokens: list[int]) -> Row:
        submit = choice.request.submit
        sample = None
        if start + len(tokens) == len(choice.token_ids):
            is_prompt = choice.request.state is RequestState.LOCAL
            history = choice.token_ids if submit.params.needs_history else []
            sample = SampleSpec(
                params=submit.params,
                seed=submit.seed,
                step=choice.output_count,
                choices=tuple(range(submit.params.n)) if is_prompt else (choice.index,),
                prompt_ids=history[: choice.prompt_tokens],
                output_ids=history[choice.prompt_tokens :],
            )
        return Row(choice.owner, tuple(tokens), start, self.pool.table(choice.owner), sample)

    def _add(self, choice: Choice, drawn: Sampled, now: float) -> list[Emission]:
        request = choice.request
        request.times.last_token_s = now
        matched = choice.add(drawn, self._eos_token_ids, self._max_context)
        delta = Delta(request.submit.request_id, choice.index, (drawn,), choice.finish_reason, matched)
        if choice.finish_reason is None:
            return [(request, delta)]
        if choice.state is ChoiceState.RUNNING:
            self._running.remove(choice)
            self._leaving.append(choice.owner)
        choice.move(ChoiceState.FINISHED)
        if not request.is_finished:
            return [(request, delta)]
        done = Done(request.submit.request_id, request.cached_tokens, request.receipt())
        return [(request, delta), (request, done)]
