"""How requests end, told to all who learn from it.

finished, or broke off by an error, or left by its client ─▶ outcomes, router, controller ─▶ observers
refused unread, as too much waits already ─────────────────▶ outcomes ─────────────────────▶
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from cluster.gateway_seams import RoleController
from cluster.intake import MAX_REQUEST_ID_CHARS
from cluster.ledger import Ledger
from cluster.messages import GenerateRequest, Usage
from cluster.outcomes import Outcome, Outcomes, Reason
from cluster.run import Attempt, Run
from engine.errors import Cancelled, DeadlineExceeded, InvalidArgument, NotFound, Overloaded, TandemError
from engine.objectives import NO_OBJECTIVES
from engine.request import FinishReason, Receipt
from engine.sampling import SamplingParams
from engine.trace_context import TraceContext


@dataclass(frozen=True, slots=True)
class Ended:
    """One request that had come in good order, once it holds nothing any more; or one that was refused unread, of which
    no more is known than whose it was. `request_id` is "" where it was never given one. `arrived_s` is of the gateway's
    clock. `problem` says what it broke off with, "" where it did not. `finish_reasons` has one for each choice.
    `receipt` None: no worker had it; only where its last worker has told (`worker_told`) are the workers' parts of
    `receipt` and `usage` known. `admitted_s`: when it had a place, None where it had none. `trace`: its span, None for
    none."""

    request_id: str
    tenant: str
    arrived_s: float
    outcome: Outcome
    problem: str
    usage: Usage
    finish_reasons: tuple[FinishReason, ...]
    receipt: Receipt | None
    params: SamplingParams = field(default_factory=SamplingParams)
    is_chat: bool = False
    admitted_s: float | None = None
    attempts: tuple[Attempt, ...] = ()
    trace: TraceContext | None = None
    worker_told: bool = True


class Observer(Protocol):
    """Who is told of requests, and changes nothing."""

    def ended(self, request: Ended) -> None: ...


class Endings:
    """`controller` None: there is none."""

    def __init__(self, outcomes: Outcomes, ledger: Ledger, controller: RoleController | None) -> None:
        self._outcomes = outcomes
        self._ledger = ledger
        self._controller = controller
        self._observers: list[Observer] = []

    def observe(self, observer: Observer) -> None:
        """Tells `observer` of all that end from now on."""
        self._observers.append(observer)

    def finished(self, run: Run) -> None:
        """Call when a run was answered whole."""
        answer, booking, params = run.answer, run.booking, run.request.params
        assert booking is not None, "somebody has answered it"
        self._tell(run, "finished", "")
        self._ledger.finished(booking, answer.tpot_s, answer.token_count // params.n)
        if self._controller is not None:
            max_tokens, cached_tokens = params.n * params.max_tokens, run.usage().cached_tokens
            self._controller.answered(len(run.token_ids), cached_tokens, max_tokens, answer.token_count)

    def broke_off(self, run: Run, error: BaseException) -> None:
        """Call with what ended a run before its answer was whole."""
        if isinstance(error, Exception) and not isinstance(error, TandemError):
            # For the log, which shows a bug's traceback.
            error.add_note(f"request {run.request_id}")
        # What is no error of ours is a bug, or somebody's leaving: their words are not for others.
        self._tell(run, _reason(error), str(error) if isinstance(error, TandemError) else type(error).__name__)

    def refused(self, request: GenerateRequest, arrived_s: float, error: Overloaded) -> None:
        """Call with what a request was turned away with before it was read. `arrived_s` is of the gateway's clock."""
        # Nobody has looked at its fields.
        request_id = request.request_id if len(request.request_id) <= MAX_REQUEST_ID_CHARS else ""
        outcome = Outcome(asyncio.get_running_loop().time(), NO_OBJECTIVES, None, None, False, "rejected")
        self._outcomes.add(outcome)
        told = (request_id, request.tenant, arrived_s, outcome, str(error), Usage(0, 0, 0), (), None)
        self._publish(Ended(*told, worker_told=False))

    def _tell(self, run: Run, reason: Reason, problem: str) -> None:
        answer, booking = run.answer, run.booking
        outcome = Outcome(
            ended_s=asyncio.get_running_loop().time(),
            objectives=run.objectives,
            ttft_s=None if answer.first_s is None else answer.first_s - run.arrived_s,
            tpot_s=answer.tpot_s if reason == "finished" else None,
            was_local=booking is not None and booking.route.is_local,
            reason=reason,
        )
        self._outcomes.add(outcome)
        if not self._observers:
            return
        ended = Ended(
            request_id=run.request_id,
            tenant=run.request.tenant,
            arrived_s=run.arrived_s,
            outcome=outcome,
            problem=problem,
            usage=run.usage(),
            finish_reasons=answer.finish_reasons(),
            receipt=run.receipt() if booking is not None else None,
            params=run.request.params,
            is_chat=run.is_chat,
            admitted_s=run.admitted_s,
            attempts=tuple(run.attempts),
            trace=run.trace,
            worker_told=run.done is not None,
        )
        self._publish(ended)

    def _publish(self, ended: Ended) -> None:
        for observer in self._observers:
            observer.ended(ended)


def _reason(error: BaseException) -> Reason:
    """What it means for the attainment that a request broke off with `error`."""
    match error:
        case InvalidArgument() | NotFound():
            return "invalid"
        case Overloaded():
            return "rejected"
        case DeadlineExceeded():
            return "expired"
        case Cancelled() | asyncio.CancelledError() | GeneratorExit():
            return "cancelled"
    return "failed"
