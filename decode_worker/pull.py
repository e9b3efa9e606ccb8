"""Pulling one prompt's KV from a prefill worker into reserved blocks.

    pull task                                   loop
    open stream, read Begin   ─ Began ───────▶  reserve the whole prompt, or let it wait
    (does not read on: the sender is held)
    read frames, write blocks ◀─ grant ───────
    FirstToken                ─ First ───────▶  tokens to the gateway
    everything there, End     ─ Arrived ─────▶  join the running batch
    stream closed             ─ Ended ───────▶  blocks may be freed

The task writes only into blocks that were granted to it, and the loop frees those only after Ended.

A frame that came damaged is passed over. What is missing at the stream's end, for whatever reason, is asked for again,
from the same worker, which mostly still has it in its prefix cache and computes it anew where it has not. After some
rounds, or where its turn does not come soon, the pull fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from decode_worker.sequence import Request
from decode_worker.stream import Submit
from engine.batch import KVLayout, Runner
from engine.errors import InvalidArgument, PermissionDenied, TandemError, TransferFailed
from engine.trace_context import TraceContext
from kvtransfer.frames import Arrival, Begin, Damaged, End, FirstToken, KVBlocks, KVRange
from kvtransfer.receive import KVReceiver
from kvtransfer.transport import MAX_WANTED, PrefillCall, PrefillTransport


@dataclass(slots=True, eq=False)
class Pull:
    """One open stream. `grant` is resolved by the loop with the lead's block table."""

    request: Request
    grant: asyncio.Future[Sequence[int]]
    error: TandemError | None = None
    task: asyncio.Task[None] | None = field(default=None)


@dataclass(frozen=True, slots=True)
class Began:
    pull: Pull
    begin: Begin


@dataclass(frozen=True, slots=True)
class First:
    pull: Pull
    frame: FirstToken


@dataclass(frozen=True, slots=True)
class Arrived:
    pull: Pull
    end: End
    kv_began_s: float | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The stream is closed and its task writes no more. `pull.error` says why, None after Arrived or a cancel."""

    pull: Pull


News = Began | First | Arrived | Ended


# How often a prompt's KV is asked for again where parts of it came damaged.
REFETCHES_MAX = 3
# How long such a call may wait for its turn. It holds blocks here and waits for some there; whoever holds those may
# wait for these.
REFETCH_BEGINS_S = 2.0


# Spans, by name: what a decode worker does of an attempt, and of that what brings the prompt's KV here.
SERVE = "decode worker"
PULL = "pull"


class Watch(Protocol):
    """Is told what is seen of the links to prefill workers."""

    def took(self, kv_bytes: int) -> None:
        """A frame was taken."""
        ...

    def moved(self, address: str, kv_bytes: int, seconds: float) -> None:
        """So much KV came in a row, in so long."""
        ...

    def damaged(self, address: str, problem: str, of: Submit) -> None:
        """A frame of a request came that is not what was sent, or came again."""
        ...


def pull_span(attempt: TraceContext) -> TraceContext:
    """The span of a request's pull, however many calls that takes; `attempt` is the gateway's."""
    return attempt.child(SERVE).child(PULL)


def call_for(request: Request, layout: KVLayout, lease: int, now: float, wanted: tuple[KVRange, ...]) -> PrefillCall:
    """What to ask the request's prefill worker for, at time `now`."""
    submit = request.submit
    due_s = submit.ttft_due_s
    return PrefillCall(
        request_id=submit.request_id,
        token_ids=submit.token_ids,
        params=submit.params,
        seed=submit.seed,
        have_tokens=request.have_tokens,
        layout=layout,
        deadline_s=None if request.deadline_s is None else max(0.0, request.deadline_s - now),
        salt=submit.salt,
        ttft_due_s=None if due_s is None else request.times.arrived_s + due_s - now,
        prompt_tokens=submit.prompt_tokens,
        lease=lease,
        wanted=wanted,
        ticket=submit.ticket,
        trace=None if submit.trace is None else pull_span(submit.trace),
    )


def start(
    request: Request,
    runner: Runner,
    transport: PrefillTransport,
    leases: Iterator[int],
    tell: Callable[[News], None],
    watch: Watch,
) -> Pull:
    """Opens the stream in a task of its own. Each call has one of `leases`. `tell` gets Ended exactly once, last,
    however the task ends."""
    pull = Pull(request, asyncio.get_running_loop().create_future())
    intake = _Intake(pull, runner, tell, watch)
    pull.task = asyncio.create_task(_run(intake, transport, leases))
    # A callback, not a `finally` inside: a task that is cancelled before it first runs never enters its body.
    pull.task.add_done_callback(lambda _: tell(Ended(pull)))
    return pull


async def _run(intake: _Intake, transport: PrefillTransport, leases: Iterator[int]) -> None:
    pull, loop = intake.pull, asyncio.get_running_loop()
    try:
        for _ in range(1 + REFETCHES_MAX):
            call = call_for(pull.request, intake.layout, next(leases), loop.time(), intake.missing())
            try:
                async with transport.open(intake.address, call) as frames:
                    await intake.read(frames, call)
            except PermissionDenied as error:
                raise TransferFailed(f"the prefill worker refused the call: {error}") from error
            except InvalidArgument as error:
                if not call.wanted:
                    raise
                # Blocks of another size: it is another worker than the one that sent the rest.
                raise TransferFailed(f"the missing KV cannot be had: {error}") from error
            if intake.is_whole:
                return
        raise TransferFailed(f"KV did not come whole in {1 + REFETCHES_MAX} streams: {intake.problem}")
    except TandemError as error:
        pull.error = error


def _around(parts: Sequence[KVRange]) -> KVRange:
    return KVRange(
        min(part.first_token for part in parts),
        max(part.end_token for part in parts),
        min(part.first_layer for part in parts),
        max(part.end_layer for part in parts),
    )


class _Intake:
    """What has come of one prompt, by one stream or, where frames were damaged, by several."""

    def __init__(self, pull: Pull, runner: Runner, tell: Callable[[News], None], watch: Watch) -> None:
        self.pull = pull
        self.address = pull.request.submit.prefill_address
        self.layout = runner.layout
        self.problem = ""
        self.is_whole = False
        self._runner = runner
        self._tell = tell
        self._watch = watch
        self._begin: Begin | None = None
        self._receiver: KVReceiver | None = None
        self._block_ids: Sequence[int] = ()
        self._first_token_s: float | None = None
        self._kv_began_s: float | None = None
        self._kv_bytes = 0
        # Since the first token.
        self._late_bytes, self._last_kv_s = 0, 0.0

    def missing(self) -> tuple[KVRange, ...]:
        """What to ask for; () for everything."""
        missing = self._receiver.missing() if self._receiver is not None else ()
        if self._receiver is not None and not missing:
            # Only the first token is: it comes with any part.
            return self._receiver.last_block()
        return missing if len(missing) <= MAX_WANTED else (_around(missing),)

    async def read(self, frames: AsyncIterator[Arrival], call: PrefillCall) -> None:
        """Reads a stream to its end. Raises TransferFailed for one that is not what was asked for."""
        try:
            async with asyncio.timeout(REFETCH_BEGINS_S if self._receiver is not None else None):
                begin = await anext(frames, None)
        except TimeoutError:
            raise TransferFailed(f"the missing KV did not begin to come within {REFETCH_BEGINS_S:g} s") from None
        if isinstance(begin, Damaged):
            self._note(begin.problem)
            return
        if not isinstance(begin, Begin):
            raise TransferFailed(f"KV stream starts with {type(begin).__name__} instead of Begin")
        await self._begins(begin, call)
        end: End | None = None
        is_damaged = False
        async for frame in frames:
            match frame:
                case KVBlocks():
                    self._take(frame, call)
                case FirstToken():
                    self._first(frame, call)
                case Damaged(problem=problem):
                    is_damaged = True
                    self._note(problem)
                case End():
                    end = frame
                    break
                case Begin():
                    raise TransferFailed("KV stream begins twice")
        if end is None and not is_damaged:
            # Otherwise the word of the end may be what came damaged, which has been counted.
            self._note("the stream stopped without End")
        if self._is_complete:
            self._arrived(end)
        elif not self.problem:
            self._note("the stream ended before all KV was there")

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _is_complete(self) -> bool:
        return self._receiver is not None and self._receiver.complete and self._first_token_s is not None

    async def _begins(self, begin: Begin, call: PrefillCall) -> None:
        if self._receiver is not None:
            self._receiver.begins_again(begin)
            return
        self._receiver = KVReceiver(begin, self.layout, len(call.token_ids), call.have_tokens, wants_kv=call.wants_kv)
        self._begin = begin
        self._tell(Began(self.pull, begin))
        self._block_ids = await self.pull.grant

    def _take(self, frame: KVBlocks, call: PrefillCall) -> None:
        assert self._receiver is not None, "a stream begins with Begin"
        assert self._begin is not None, "a stream begins with Begin"
        if not self._receiver.accept(frame):
            # What was asked for twice may come twice.
            if not call.wanted:
                self._note(f"KV of tokens [{frame.first_token}, {frame.end_token}) came again")
            return
        size = self.layout.block_size
        target = self._block_ids[frame.first_token // size : -(-frame.end_token // size)]
        payload = memoryview(frame.payload)
        self._kv_bytes += payload.nbytes
        self._watch.took(payload.nbytes)
        self._late_bytes += payload.nbytes
        self._last_kv_s = asyncio.get_running_loop().time()
        if self._kv_began_s is None:
            self._kv_began_s = self._last_kv_s
        dtype = self._begin.layout.dtype
        self._runner.import_blocks(target, frame.first_token % size, frame.layers, frame.block_tokens, payload, dtype)

    def _first(self, frame: FirstToken, call: PrefillCall) -> None:
        if len(frame.sampled) != call.params.n:
            raise TransferFailed(f"{len(frame.sampled)} first tokens came for {call.params.n} choices")
        named = [
            token_id for token in frame.sampled for token_id in (token.token_id, *(other for other, _ in token.top))
        ]
        if max(named) >= self._runner.vocab_size:
            raise TransferFailed(f"first tokens came that are none of {self._runner.vocab_size}")
        if self._first_token_s is not None:
            # Drawn anew for the sake of the KV beside it; one has gone out already.
            return
        self._tell(First(self.pull, frame))
        self._first_token_s, self._late_bytes = asyncio.get_running_loop().time(), 0

    def _arrived(self, end: End | None) -> None:
        assert self._first_token_s is not None, "nothing is whole without a first token"
        self.is_whole = True
        if end is not None and not self.problem:
            self._watch.moved(self.address, self._late_bytes, self._last_kv_s - self._first_token_s)
        else:
            # A stream's own totals are of that stream alone.
            end = End(self._kv_bytes, min(end.kv_bytes_before_first_token if end else 0, self._kv_bytes))
        self._tell(Arrived(self.pull, end, self._kv_began_s))

    def _note(self, problem: str) -> None:
        self.problem = problem
        self._watch.damaged(self.address, problem, self.pull.request.submit)
