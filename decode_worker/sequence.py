"""A request on a decode worker, and its choices.

A request first needs its prompt's KV, from a prefill worker or computed here:

    QUEUED ──▶ PULLING ──▶ RESERVING ──▶ RECEIVING ──▶ ACTIVE      pulled
       │          └────────────┴──────────────┐
       ├───────────────────────────────────▶ LOCAL ──▶ ACTIVE      computed here, from the start or after demotion
       └───────────────────────────────────────────────▶ ACTIVE      begun by another worker, several choices

Then its choices live on their own, each with its own block table:

    NEW ──▶ RUNNING ◀──▶ COMPUTING ──▶ FINISHED      COMPUTING: waiting for blocks, or being (re)computed in chunks
      └────────┴────────────────────────▶ FINISHED
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from operator import attrgetter

from decode_worker.stream import Delta, Done, Failed, Submit
from engine.batch import Sampled
from engine.errors import TandemError
from engine.multi_step import can_repeat
from engine.request import FinishReason, Receipt

TOKEN_ID = attrgetter("token_id")


class RequestState(Enum):
    QUEUED = auto()
    PULLING = auto()
    RESERVING = auto()
    RECEIVING = auto()
    LOCAL = auto()
    ACTIVE = auto()


class ChoiceState(Enum):
    NEW = auto()
    COMPUTING = auto()
    RUNNING = auto()
    FINISHED = auto()


LEGAL_REQUEST_MOVES = {
    (RequestState.QUEUED, RequestState.PULLING),
    (RequestState.QUEUED, RequestState.LOCAL),
    (RequestState.QUEUED, RequestState.ACTIVE),
    (RequestState.PULLING, RequestState.RESERVING),
    (RequestState.PULLING, RequestState.LOCAL),
    (RequestState.RESERVING, RequestState.RECEIVING),
    (RequestState.RESERVING, RequestState.LOCAL),
    (RequestState.RECEIVING, RequestState.ACTIVE),
    (RequestState.LOCAL, RequestState.ACTIVE),
}
LEGAL_CHOICE_MOVES = {
    (ChoiceState.NEW, ChoiceState.COMPUTING),
    (ChoiceState.NEW, ChoiceState.RUNNING),
    (ChoiceState.COMPUTING, ChoiceState.RUNNING),
    (ChoiceState.RUNNING, ChoiceState.COMPUTING),
    (ChoiceState.NEW, ChoiceState.FINISHED),
    (ChoiceState.COMPUTING, ChoiceState.FINISHED),
    (ChoiceState.RUNNING, ChoiceState.FINISHED),
}


@dataclass(slots=True)
class Timeline:
    """When a request passed its marks, seconds of the worker's clock; None where it has not (or never will).
    `pull_started_s`: its KV stream was asked for; `kv_began_s`: the first KV came by it."""

    arrived_s: float
    pull_started_s: float | None = None
    kv_began_s: float | None = None
    compute_started_s: float | None = None
    first_token_s: float | None = None
    kv_ready_s: float | None = None
    first_step_s: float | None = None
    last_token_s: float | None = None
    remote_queue_s: float = 0.0
    remote_prefill_s: float = 0.0

    @property
    def is_prompt_started(self) -> bool:
        """False until the prompt is computed here, or was elsewhere."""
        return self.compute_started_s is not None or self.first_token_s is not None

    def compute_starts(self, now: float) -> None:
        if not self.is_prompt_started:
            self.compute_started_s = now

    def decode_starts(self, now: float) -> None:
        if self.first_step_s is None:
            self.first_step_s = now


@dataclass(slots=True, eq=False)
class Request:
    """One Submit. `serial` orders requests by arrival: the smallest is the oldest. `have_tokens` says how much of the
    prompt was in the local cache when its pull began; `cached_tokens` how much was not computed, on either side.
    `problem`: why a step could draw nothing for it."""

    key: str
    serial: int
    submit: Submit
    deadline_s: float | None
    times: Timeline
    state: RequestState = RequestState.QUEUED
    have_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    kv_bytes: int = 0
    kv_bytes_before_first_token: int = 0
    is_dropped: bool = False
    problem: TandemError | None = None
    choices: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.choices = [Choice(self, index) for index in range(self.submit.params.n)]

    @property
    def lead(self) -> Choice:
        """The choice whose table holds the prompt until the others fork it."""
        return self.choices[0]

    @property
    def has_begun(self) -> bool:
        """Whether anything of it was computed here, or has come from a prefill worker."""
        if self.state is RequestState.LOCAL:
            return self.times.first_token_s is not None or self.lead.computed > self.cached_tokens
        return self.state not in (RequestState.QUEUED, RequestState.PULLING)

    @property
    def is_read(self) -> bool:
        """Whether its client has had tokens, and waits for the next."""
        return self.times.first_token_s is not None or self.submit.prompt_tokens > 0

    @property
    def is_finished(self) -> bool:
        return all(choice.state is ChoiceState.FINISHED for choice in self.choices)

    def accept(self, eos_token_ids: frozenset[int], max_context: int) -> None:
        """Works out what ends its choices."""
        params = self.submit.params
        stops = frozenset(params.stop_token_ids)
        for choice in self.choices:
            choice.stop_ids = stops if params.ignore_eos else stops | eos_token_ids
            choice.can_repeat = can_repeat(params)
            choice.max_length = min(choice.prompt_tokens + params.max_tokens, max_context)

    def move(self, state: RequestState) -> None:
        assert (self.state, state) in LEGAL_REQUEST_MOVES, (
            f"{self.key} cannot go from {self.state.name} to {state.name}"
        )
        self.state = state

    def lose(self, problem: TandemError) -> Failed:
        """It has come to nothing in a step: none of its choices gets anything any more."""
        self.is_dropped, self.problem = True, problem
        return Failed(self.submit.request_id, problem)

    def done(self) -> Done:
        return Done(self.submit.request_id, self.cached_tokens, self.receipt())

    def receipt(self) -> Receipt:
        """What the workers know of where the time went; the gateway adds the rest."""
        times = self.times
        first_token = times.arrived_s if times.first_token_s is None else times.first_token_s
        kv_ready = first_token if times.kv_ready_s is None else max(times.kv_ready_s, first_token)
        first_step = kv_ready if times.first_step_s is None else times.first_step_s
        last_token = first_step if times.last_token_s is None else max(times.last_token_s, first_step)
        queue_s, prefill_s = times.remote_queue_s, times.remote_prefill_s
        if times.compute_started_s is not None:
            queue_s += times.compute_started_s - times.arrived_s
            prefill_s += first_token - times.compute_started_s
        return Receipt(
            prefill_queue_s=queue_s,
            prefill_s=max(0.0, prefill_s),
            kv_exposed_s=kv_ready - first_token,
            decode_queue_s=first_step - kv_ready,
            decode_s=last_token - first_step,
            kv_bytes=self.kv_bytes,
            kv_bytes_before_first_token=self.kv_bytes_before_first_token,
            preemptions=self.preemptions,
            prefill_worker=self.submit.prefill_address,
        )


@dataclass(slots=True, eq=False)
class Choice:
    """One of a request's n answers. `token_ids` is prompt and output, of which `given_tokens` came with the request;
    `computed` counts those whose KV is written, as long as it is COMPUTING. While it runs, `reserved` tokens have slots
    in `block_ids`.

    `max_length` tokens end it, or one of `stop_ids`; both are set when the request is accepted. `can_repeat`: nothing
    else does, and several steps may run in one go. `last_token_s`: when it got its last token.
    """

    request: Request
    index: int
    state: ChoiceState = ChoiceState.NEW
    token_ids: list[int] = field(default_factory=list)
    computed: int = 0
    reserved: int = 0
    block_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    max_length: int = 0
    stop_ids: frozenset[int] = frozenset()
    can_repeat: bool = False
    last_token_s: float = 0.0
    # Worked out once: they are asked for at every step.
    owner: str = field(init=False)
    prompt_tokens: int = field(init=False)
    given_tokens: int = field(init=False)
    age: tuple[int, int] = field(init=False)
    draws: tuple[int, ...] = field(init=False)
    tpot_s: float | None = field(init=False)

    def __post_init__(self) -> None:
        submit = self.request.submit
        so_far = submit.so_far[self.index]
        self.token_ids = [*submit.token_ids, *so_far.token_ids]
        self.state = ChoiceState.FINISHED if so_far.is_finished else ChoiceState.NEW
        self.owner = f"{self.request.key}/{self.index}"  # the name of its table in the block pool
        self.prompt_tokens = submit.prompt_count
        self.given_tokens = len(self.token_ids)
        self.age = (self.request.serial, self.index)  # sorts choices, the oldest first
        self.draws = (self.index,)
        self.tpot_s = submit.tpot_s

    @property
    def output_count(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    def move(self, state: ChoiceState) -> None:
        assert (self.state, state) in LEGAL_CHOICE_MOVES, (
            f"{self.owner} cannot go from {self.state.name} to {state.name}"
        )
        self.state = state

    def add(self, drawn: Sampled) -> Delta:
        """Appends a drawn token, and says so; sets `finish_reason` if it is the last."""
        token_id = drawn.token_id
        self.token_ids.append(token_id)
        matched = None
        if token_id in self.stop_ids:
            self.finish_reason, matched = FinishReason.STOP, token_id
        elif len(self.token_ids) >= self.max_length:
            self.finish_reason = FinishReason.LENGTH
        return Delta(self.request.submit.request_id, self.index, (drawn,), self.finish_reason, matched)

    def add_many(self, drawn: tuple[Sampled, ...]) -> Delta:
        """Appends tokens of which none is a stop token, at most as many as it may still have."""
        self.token_ids.extend(map(TOKEN_ID, drawn))
        assert len(self.token_ids) <= self.max_length, f"{self.owner} has more tokens than it may have"
        if len(self.token_ids) == self.max_length:
            self.finish_reason = FinishReason.LENGTH
        return Delta(self.request.submit.request_id, self.index, drawn, self.finish_reason)

    def ends_by_length(self, more: int) -> bool:
        """Whether `more` tokens make the answer as long as it may be."""
        return len(self.token_ids) + more >= self.max_length
