"""Pulling one prompt's KV from a prefill worker into reserved blocks.

    pull task                                   loop
    open stream, read Begin   ─ Began ───────▶  reserve the whole prompt, or let it wait
    (does not read on: the sender is held)
    read frames, write blocks ◀─ grant ───────
    FirstToken                ─ First ───────▶  tokens to the gateway
    everything there, End     ─ Arrived ─────▶  join the running batch
    stream closed             ─ Ended ───────▶  blocks may be freed

The task writes only into blocks that were granted to it, and the loop frees those only after Ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from decode_worker.sequence import Request
from engine.batch import KVLayout, Runner
from engine.errors import TandemError, TransferFailed
from kvtransfer.frames import Begin, End, FirstToken, Frame, KVBlocks
from kvtransfer.receive import KVReceiver
from kvtransfer.transport import PrefillCall, PrefillTransport


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


@dataclass(frozen=True, slots=True)
class Ended:
    """The stream is closed and its task writes no more. `pull.error` says why, None after Arrived or a cancel."""

    pull: Pull


News = Began | First | Arrived | Ended


# Told how much KV came from an address, and in how many seconds.
Measure = Callable[[str, int, float], None]


def call_for(request: Request, layout: KVLayout, now: float) -> PrefillCall:
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
    )


def start(
    request: Request,
    runner: Runner,
    transport: PrefillTransport,
    call: PrefillCall,
    tell: Callable[[News], None],
    measure: Measure,
) -> Pull:
    """Opens the stream in a task of its own. `tell` gets Ended exactly once, last, however the task ends."""
    pull = Pull(request, asyncio.get_running_loop().create_future())
    pull.task = asyncio.create_task(_run(pull, runner, transport, call, tell, measure))
    # A callback, not a `finally` inside: a task that is cancelled before it first runs never enters its body.
    pull.task.add_done_callback(lambda _: tell(Ended(pull)))
    return pull


async def _run(
    pull: Pull,
    runner: Runner,
    transport: PrefillTransport,
    call: PrefillCall,
    tell: Callable[[News], None],
    measure: Measure,
) -> None:
    address = pull.request.submit.prefill_address
    try:
        async with transport.open(address, call) as frames:
            received_bytes, seconds = await _read(pull, runner, call, frames, tell)
            measure(address, received_bytes, seconds)
    except TandemError as error:
        pull.error = error


async def _read(
    pull: Pull, runner: Runner, call: PrefillCall, frames: AsyncIterator[Frame], tell: Callable[[News], None]
) -> tuple[int, float]:
    """Reads the stream to its end; returns the bytes of KV that came after the first token, and in how long."""
    loop = asyncio.get_running_loop()
    first_token_s: float | None = None
    received_bytes, last_kv_s = 0, 0.0
    layout = runner.layout
    begin = await anext(frames, None)
    if not isinstance(begin, Begin):
        raise TransferFailed(f"KV stream starts with {type(begin).__name__} instead of Begin")
    receiver = KVReceiver(begin, layout, len(call.token_ids), call.have_tokens)
    tell(Began(pull, begin))
    block_ids = await pull.grant
    async for frame in frames:
        match frame:
            case KVBlocks():
                receiver.accept(frame)
                first_slot = frame.first_token % layout.block_size
                end_block = -(-frame.end_token // layout.block_size)
                target = block_ids[frame.first_token // layout.block_size : end_block]
                payload = memoryview(frame.payload)
                received_bytes += payload.nbytes
                last_kv_s = loop.time()
                runner.import_blocks(target, first_slot, frame.layers, frame.block_tokens, payload, begin.layout.dtype)
            case FirstToken():
                if len(frame.sampled) != call.params.n:
                    raise TransferFailed(f"{len(frame.sampled)} first tokens came for {call.params.n} choices")
                tell(First(pull, frame))
                first_token_s, received_bytes = loop.time(), 0
            case End():
                if not receiver.complete:
                    raise TransferFailed("KV stream ended before all KV was there")
                tell(Arrived(pull, frame))
                return received_bytes, 0.0 if first_token_s is None else last_kv_s - first_token_s
            case Begin():
                raise TransferFailed("KV stream begins twice")
    raise TransferFailed("KV stream stopped without End")
