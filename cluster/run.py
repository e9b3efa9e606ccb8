"""One request under way at the gateway: what was asked, how far it is, and what to ask workers for next.

A run is handed to workers once, or again where they failed it. Each time it asks for what is still missing: tokens that
came are never drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cluster.answer import Answer
from cluster.gateway_config import OnFailure
from cluster.messages import Complete, GenerateRequest, Usage
from cluster.prefix_index import BlockNames
from cluster.routing.booking import Booking
from cluster.routing.query import Route, RouteQuery
from cluster.security.quotas import Charge
from decode_worker.stream import Delta, Done, Submit
from engine.errors import DeadlineExceeded, TandemError, Unavailable
from engine.log_fields import told
from engine.objectives import Objectives
from engine.request import Receipt
from engine.trace_context import TraceContext

# The span of each attempt, by name.
ATTEMPT = "attempt"


@dataclass(slots=True)
class Attempt:
    """One hand-over to workers. `ended_s` None: it is under way. `error_type` and `problem` say how it failed."""

    submitted_s: float
    route: Route
    ended_s: float | None = None
    error_type: str = ""
    problem: str = ""


@dataclass(slots=True)
class Run:
    """`seed` is the request's own, or was drawn for it: every attempt has the same, so that its draws go on. Times are
    of the gateway's clock; `handed_over_s` is when a worker got it first, `submitted_s` when one got it last.
    `handed_back`: workers in a row that gave it back without a token. `request_id` is "" until one was taken for it.
    `admitted_s` is when it had a place, None before. `trace`: its span, None where it is in no trace. `done` is its
    worker's last word, None before, or where that was lost."""

    request: GenerateRequest
    token_ids: tuple[int, ...]
    objectives: Objectives
    on_failure: OnFailure
    arrived_s: float
    deadline_s: float | None
    answer: Answer
    charge: Charge
    seed: int | None = None
    handed_over_s: float = 0.0
    submitted_s: float = 0.0
    booking: Booking | None = None
    drawn: int = 0
    handed_back: int = 0
    retries: int = 0
    done: Done | None = None
    request_id: str = ""
    trace: TraceContext | None = None
    is_chat: bool = False
    admitted_s: float | None = None
    attempts: list[Attempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seed = self.request.params.seed

    @property
    def is_over(self) -> bool:
        return self.done is not None or self.answer.has_ended

    @property
    def is_resumed(self) -> bool:
        """Whether tokens of it came from a worker that was lost."""
        return self.answer.first_s is not None

    @property
    def used_tokens(self) -> int:
        """Of its tenant's quota: none as long as no worker has had it. Of an answer that is not whole what was drawn,
        though nobody may have read it."""
        if self.booking is None:
            return 0
        return len(self.token_ids) + (self.answer.token_count if self.is_over else self.drawn)

    def believe(self, delta: Delta, vocab_size: int) -> None:
        """Call with a worker's tokens when they come. Raises Unavailable where they are not what was asked for."""
        params, drawn = self.request.params, self.drawn + len(delta.tokens)
        if not 0 <= delta.choice < params.n:
            raise Unavailable(f"it drew choice {delta.choice} of {params.n}")
        if drawn > params.n * params.max_tokens:
            raise Unavailable(f"it drew more than {params.n} times {params.max_tokens} tokens")
        # They may become part of a prompt, on another worker.
        if any(token.token_id >= vocab_size for token in delta.tokens):
            raise Unavailable(f"it drew tokens that are none of {vocab_size}")
        self.drawn = drawn
        if delta.tokens:
            self.handed_back = 0

    def query(self) -> RouteQuery:
        """The question to the router."""
        params, prompt_tokens = self.request.params, len(self.token_ids)
        token_ids = self._tokens_so_far()
        # Who was never put off was told nothing that could be learned from, and what was said before holds.
        before = self.booking.query if self.booking is not None else None
        return RouteQuery(
            prompt_tokens=len(token_ids),
            total_tokens=prompt_tokens + params.max_tokens,
            rows=params.n,
            objectives=replace(self.objectives, ttft_s=None) if self.is_resumed else self.objectives,
            arrived_s=self.arrived_s,
            names=BlockNames(token_ids, self.request.salt),
            was_deferred=before is not None,
            # What failures took says nothing of the router's promises.
            promised_s=before.promised_s if before is not None and not self.retries else 0.0,
            is_resumed=self.is_resumed,
        )

    def submit(self, booking: Booking, now: float) -> Submit:
        """What to hand to the worker of `booking`. Raises DeadlineExceeded."""
        assert self.seed is not None, "a seed is drawn before the first attempt"
        self.submitted_s = now
        if not (self.retries or self.is_resumed):
            self.handed_over_s = now
        left_s = None if self.deadline_s is None else self.deadline_s - now
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("routing")
        trace = None if self.trace is None else self.trace.child(ATTEMPT, len(self.attempts))
        self.attempts.append(Attempt(now, booking.route))
        ttft_s = None if self.is_resumed else self.objectives.ttft_s
        token_ids = self._tokens_so_far()
        has_many = self.is_resumed and self.request.params.n > 1
        return Submit(
            request_id=self.request_id,
            token_ids=token_ids,
            params=self.request.params,
            seed=self.seed,
            prefill_address=booking.route.prefill_address,
            deadline_s=left_s,
            salt=self.request.salt,
            ttft_due_s=None if ttft_s is None else max(0.0, self.arrived_s + ttft_s - now),
            tpot_s=self.objectives.tpot_s,
            prompt_tokens=len(self.token_ids) if len(token_ids) > len(self.token_ids) else 0,
            resumed=self.answer.so_far() if has_many else (),
            trace=trace,
        )

    def attempt_ends(self, now: float, error: TandemError | None) -> None:
        """Call when its worker has no more of it."""
        if not self.attempts or self.attempts[-1].ended_s is not None:
            return
        attempt = self.attempts[-1]
        attempt.ended_s = now
        if error is not None:
            attempt.error_type, attempt.problem = type(error).__name__, told(error)

    def complete(self) -> Complete:
        """The whole answer."""
        return Complete(self.answer.choices(), self.usage(), self.receipt())

    def receipt(self) -> Receipt:
        """As far as it got. Without `done` the worker's part is not known."""
        assert self.booking is not None, "some worker has had it"
        answer, done, route = self.answer, self.done, self.booking.route
        return replace(
            done.receipt if done is not None else Receipt(),
            gateway_queue_s=self.handed_over_s - self.arrived_s,
            ttft_s=0.0 if answer.first_s is None else answer.first_s - self.arrived_s,
            tpot_s=answer.tpot_s,
            retries=self.retries,
            retry_s=self.submitted_s - self.handed_over_s,
            prefill_worker=route.prefill_id,
            decode_worker=route.decode_id,
            predicted_ttft_s=route.predicted_ttft_s,
            predicted_tpot_s=route.predicted_tpot_s,
        )

    def usage(self) -> Usage:
        """The tokens so far."""
        prompt_tokens = len(self.token_ids)
        # A worker that went on with it may have found more than the prompt in its cache.
        cached_tokens = min(self.done.cached_tokens if self.done is not None else 0, prompt_tokens - 1)
        return Usage(prompt_tokens, self.answer.token_count, cached_tokens)

    def _tokens_so_far(self) -> tuple[int, ...]:
        """The prompt, and what was drawn after it where there is one choice: several differ."""
        if not self.is_resumed or self.request.params.n > 1:
            return self.token_ids
        return self.token_ids + self.answer.so_far()[0].token_ids
