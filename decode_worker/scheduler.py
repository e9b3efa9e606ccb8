"""What the decode worker computes next, and who holds its blocks. Pure: values in, values out, `now` is an argument.

Every step takes one token of each running choice, and with what is left of the local token budget chunks of prompts
that are computed here. The states are in `sequence.py`.

Who may have blocks, when there are too few: running choices first, then those that wait, in turn (`room.py`). A running
choice that cannot grow takes the blocks of the youngest one, which is recomputed later (preemption by recompute). A
request that waits while nothing runs takes the prefix that the youngest puller has pinned (demotion: that one is
computed here). So whose turn it is always gets on, whatever the others hold.

With a cost model, objectives count: which running choices are in a step says `selection.py`, how much of the local
prompts `local_prompts.py`. Who has blocks does not change by that.

A step may be scheduled while another is under way. It then goes on from tokens that are not drawn yet (`ahead.py`); a
choice that turns out to have ended has a row for nothing. Blocks go back in `schedule` and `complete`, once no step
under way may name them (`flight.py`), so preemption and demotion wait until there is none. All else may come any time.
Or a step is repeated while nothing changes (`repeat.py`); the two exclude each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from decode_worker.config import DecodeConfig
from decode_worker.flight import DecodeBatch, Flight
from decode_worker.local_prompts import LocalPrompts
from decode_worker.pulls import Pulls
from decode_worker.repeat import Repeat, book_blocks, drawn_by_row, plan, settle
from decode_worker.room import Room
from decode_worker.running import Copies, Running
from decode_worker.sequence import Choice, ChoiceState, Request, RequestState
from decode_worker.stream import Delta, Event
from engine.batch import Batch, Sampled, StepOutput
from engine.block_pool import BlockPool
from engine.errors import InvalidArgument, Overloaded
from engine.request_checks import check_context
from engine.step_cost import StepCost, StepWork

# An event, and the request that it belongs to.
Emission = tuple[Request, Event]


def is_unstarted(choice: Choice) -> bool:
    """Whether it runs, and its request has not had a step yet."""
    return choice.state is ChoiceState.RUNNING and choice.request.times.first_step_s is None


class DecodeScheduler:
    """Continuous batching over one block pool."""

    def __init__(
        self,
        pool: BlockPool,
        config: DecodeConfig,
        eos_token_ids: frozenset[int],
        max_context: int,
        cost: StepCost | None = None,
    ) -> None:
        self.pool = pool
        self._config = config
        self._cost = cost
        self._eos_token_ids = eos_token_ids
        self._max_context = max_context
        self._requests: dict[str, Request] = {}
        self._pulls = Pulls(pool, config.max_transfers)
        self._local = LocalPrompts(pool, config, cost)
        self._running = Running(pool, config, cost, self._local)
        self._unstarted: list[Choice] = []  # RUNNING, perhaps without a step so far
        self._flight = Flight(pool)
        self._room = Room(pool, self._pulls, self._local, self._running, self._flight)
        self._repeat: Repeat | None = None
        self.context_tokens = 0

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """Requests whose prompt's KV is not there yet, and choices that wait to be recomputed."""
        return len(self._pulls) + len(self._local)

    @property
    def queued_tokens(self) -> int:
        """Tokens that are to be computed here and are not yet."""
        return self._local.queued_tokens

    @property
    def queued_s(self) -> float:
        """What these take by the cost model, 0.0 without one."""
        return self._local.queued_s

    @property
    def is_empty(self) -> bool:
        return not (self._requests or self._flight.is_anybody_leaving)

    # ── a request comes, and gets its prompt's KV ────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, now: float) -> None:
        """Raises InvalidArgument for what can never fit, Overloaded when too many are unfinished."""
        longest = max(len(choice.token_ids) for choice in request.choices if choice.state is not ChoiceState.FINISHED)
        check_context("prompt", longest, self._max_context)
        tokens = request.submit.prompt_count + request.submit.params.max_tokens
        need = self.pool.blocks_for(min(tokens, self._max_context))
        if need > self.pool.num_blocks:
            limit = self.pool.num_blocks * self.pool.block_size
            raise InvalidArgument("prompt + max_tokens", f"{tokens} tokens", f"at most {limit} on this worker")
        if len(self._requests) >= self._config.max_queued:
            raise Overloaded(f"{len(self._requests)} requests are unfinished on this decode worker")
        request.accept(self._eos_token_ids, self._max_context)
        self._requests[request.key] = request
        if request.submit.resumed:
            self._resume(request, now)
        elif request.submit.prefill_address:
            self._pulls.add(request, now)
        else:
            self._compute_here(request, now)

    def start_pulls(self) -> list[Request]:
        """Requests whose KV stream is to be opened now; each has pinned what the local cache holds of its prompt."""
        return self._pulls.start()

    def began(self, request: Request, first_token: int, cached_tokens: int) -> None:
        """The stream's first frame is here: KV from `first_token` on will come. Now the request wants blocks."""
        self._pulls.began(request, first_token, cached_tokens)

    def grant(self, now: float) -> list[Request]:
        """Reserves whole prompts for those whose turn it is; returns who may read on."""
        return self._room.grant(now)

    def first_tokens(self, request: Request, sampled: tuple[Sampled, ...], now: float) -> list[Emission]:
        """The prompt's first output tokens, one per choice; they go out before the KV is complete."""
        request.times.first_token_s = now
        events: list[Emission] = []
        for choice, drawn in zip(request.choices, sampled, strict=True):
            self._book(choice, choice.add(drawn), now, events)
        return events

    def arrived(self, request: Request, now: float) -> None:
        """All of the prompt's KV is in the lead's blocks: the choices fork it and join the running batch."""
        request.move(RequestState.ACTIVE)
        self._pulls.remove(request)
        request.times.kv_ready_s = now
        lead, prompt = request.lead, request.submit.token_ids
        self.pool.seal(lead.owner, prompt, len(prompt))
        for choice in request.choices:
            if choice.state is ChoiceState.FINISHED:
                continue
            if choice is not lead:
                self.pool.fork(lead.owner, choice.owner)
            self._start_running(choice)
        if lead.state is ChoiceState.FINISHED:
            self._flight.leave(lead.owner)

    def withdraw(self, request: Request) -> None:
        """The request ends, finished or not: nothing more is computed for it. Its blocks stay until `give_back`."""
        request.is_dropped = True
        self._requests.pop(request.key, None)
        self._pulls.remove(request)
        for choice in request.choices:
            if choice.state is ChoiceState.RUNNING:
                self._running.remove(choice)
            elif choice.state is ChoiceState.COMPUTING:
                self._local.remove(choice)

    def give_back(self, request: Request) -> None:
        """A withdrawn request's blocks, into which no KV is received any more, go back after the steps under way."""
        for choice in request.choices:
            self._flight.leave(choice.owner)

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self, now: float) -> DecodeBatch | None:
        """The next batch, None when there is nothing to compute, or nothing yet. At most one other may be under way,
        returned from here and not yet completed; this one runs after it."""
        self._flight.release()
        reached = self._flight.reached()
        copies: Copies = []
        # Only without a step under way can somebody be preempted: it would take blocks from under that step.
        is_ahead = self._flight.is_under_way
        chosen = self._running.rows_ahead(reached, copies, now) if is_ahead else self._running.decode_rows(copies, now)
        if chosen is None:
            return None
        selection, rows = chosen
        work = selection.work
        if self._local:
            self._room.admit(now)
            chunks = self._local.chunks(reached, work, selection.limit_s, now)
        else:
            chunks = []
        self.context_tokens = work.decode_context
        if not rows and not chunks:
            return None
        rows += [row for row, _ in chunks]
        choices = (*selection.choices, *(choice for _, choice in chunks))
        prompts = tuple((len(row.token_ids), row.start) for row, _ in chunks)
        work = StepWork(prompts, work.decode_rows, work.decode_context) if prompts else work
        batch = DecodeBatch(
            Batch(tuple(rows), tuple(copies)), choices, work.decode_rows, work, steady_s=selection.steady_s
        )
        self._flight.launch(batch)
        return batch

    def repeat(self, batch: DecodeBatch) -> Repeat | None:
        """How the batch just scheduled may be repeated until something changes it, None when it may not. `began` and
        `grant` are to be preceded by `settle` from now on."""
        self._repeat = None
        if not self._local and batch.decode_rows == len(batch.choices):
            self._repeat = plan(self.pool, batch, self._config.max_steps, self._cost)
        return self._repeat

    def settle(self, batch: DecodeBatch, steps: int) -> None:
        """Before somebody takes blocks: the repeated batch, which is under way, takes those of so many steps."""
        if self._repeat is not None:
            settle(self.pool, batch, self._repeat, steps)
            self._repeat = None

    def starts(self, batch: DecodeBatch, now: float) -> None:
        """Takes down that a scheduled step starts to run: at once, or when the one before it has been completed."""
        if self._unstarted:
            for choice in batch.choices:
                if choice.state is ChoiceState.RUNNING:
                    choice.request.times.decode_starts(now)
            self._unstarted = [choice for choice in self._unstarted if is_unstarted(choice)]
        for choice in self._local.computing:
            choice.request.times.compute_starts(now)

    def complete(self, batch: DecodeBatch, outs: Sequence[StepOutput], now: float) -> list[Emission]:
        """Books the oldest step under way, which has ended, or the steps of a repeated batch; returns the tokens that
        it gave. Requests that left meanwhile, and choices that had ended before, are passed over: their KV is never
        named in the prefix cache."""
        self._flight.land(batch)
        repeat, self._repeat = self._repeat, None
        events: list[Emission] = []
        if len(outs) > 1:
            self._complete_run(batch, repeat, outs, now, events)
        else:
            self._complete_step(batch, outs[0], now, events)
        self._flight.release()
        return events

    def _complete_step(self, batch: DecodeBatch, out: StepOutput, now: float, events: list[Emission]) -> None:
        size = self.pool.block_size
        for row, choice, sampled in zip(batch.batch.rows, batch.choices, out.sampled, strict=True):
            if choice.request.is_dropped or choice.state is ChoiceState.FINISHED:
                continue
            if row.sample is not None and (problem := row.sample.problem(sampled)) is not None:
                events.append((choice.request, choice.request.lose(problem)))
                continue
            if choice.state is not ChoiceState.RUNNING:
                self._complete_chunk(row.end, choice, sampled, now, events)
                continue
            end = row.start + 1
            if end % size == 0:
                self.pool.seal(choice.owner, choice.token_ids, end)
            self._book(choice, choice.add(sampled[0]), now, events)

    def _complete_run(
        self, batch: DecodeBatch, repeat: Repeat | None, outs: Sequence[StepOutput], now: float, events: list[Emission]
    ) -> None:
        deltas: list[Delta] = []
        for choice, drawn in zip(batch.choices, drawn_by_row(outs), strict=True):
            # Who was dropped while the run's last step ran has had the steps before it.
            deltas.append(choice.add_many(drawn[:-1] if choice.request.is_dropped else drawn))
        ends = [row.start + len(delta.tokens) for row, delta in zip(batch.batch.rows, deltas, strict=True)]
        book_blocks(self.pool, batch, repeat, len(outs), ends)
        for choice, delta in zip(batch.choices, deltas, strict=True):
            if not choice.request.is_dropped:
                self._book(choice, delta, now, events)

    def make_room(self, now: float) -> list[Request]:
        """When everybody waits: takes back pinned prefixes, the youngest first, until somebody can have blocks.

        Call while no step is under way, after `grant`. Returns pulls to be closed; their requests are computed here.
        """
        assert not self._flight.is_under_way, "somebody may have blocks after the step under way"
        demoted: list[Request] = []
        while self.is_stuck(now) and (youngest := self._room.demote(now)) is not None:
            self._compute_here(youngest, now)
            demoted.append(youngest)
            self._room.admit(now)
        return demoted

    def is_stuck(self, now: float) -> bool:
        """True when somebody waits for blocks, nobody can have them, and nobody is going to give any back."""
        return self._room.is_stuck(now)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _compute_here(self, request: Request, now: float) -> None:
        request.move(RequestState.LOCAL)
        request.lead.move(ChoiceState.COMPUTING)
        self._local.add(request.lead, now)

    def _resume(self, request: Request, now: float) -> None:
        """As if all of its choices had been preempted: each has its own tokens to be computed."""
        request.move(RequestState.ACTIVE)
        request.times.first_token_s = now
        for choice in request.choices:
            if choice.state is ChoiceState.NEW:
                choice.move(ChoiceState.COMPUTING)
                self._local.add(choice, now)

    def _start_running(self, choice: Choice) -> None:
        self._running.add(choice)
        self._unstarted.append(choice)

    def _complete_chunk(
        self, end: int, choice: Choice, sampled: tuple[Sampled, ...], now: float, events: list[Emission]
    ) -> None:
        self._local.advance(choice, end)
        self.pool.seal(choice.owner, choice.token_ids, end)
        if not sampled:
            return
        self._local.remove(choice)
        if choice.request.state is RequestState.LOCAL:
            events += self.first_tokens(choice.request, sampled, now)
            self.arrived(choice.request, now)
        else:
            self._start_running(choice)
            self._book(choice, choice.add(sampled[0]), now, events)

    def _book(self, choice: Choice, delta: Delta, now: float, events: list[Emission]) -> None:
        """Takes note of the tokens that a choice has just got, and of its end."""
        request = choice.request
        choice.last_token_s = request.times.last_token_s = now
        events.append((request, delta))
        if choice.finish_reason is None:
            return
        if choice.state is ChoiceState.RUNNING:
            self._running.remove(choice)
            self._flight.leave(choice.owner)
        choice.move(ChoiceState.FINISHED)
        if request.is_finished:
            events.append((request, request.done()))
