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
from engine.batch import Runner
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


def start(
    request: Request, runner: Runner, transport: PrefillTransport, call: PrefillCall, tell: Callable[[News], None]
) -> Pull:
    """Opens the stream in a task of its own. `tell` gets Ended exactly once, last, however the task ends."""
    pull = Pull(request, asyncio.get_running_loop().create_future())
    pull.task = asyncio.create_task(_run(pull, runner, transport, call, tell))
    # A callback, not a `finally` inside: a task that is cancelled before it first runs never enters its body.
    pull.task.add_done_callback(lambda _: tell(Ended(pull)))
    return pull


async def _run(
    pull: Pull, runner: Runner, transport: PrefillTransport, call: PrefillCall, tell: Callable[[News], None]
) -> None:
    try:
        async with transport.open(pull.request.submit.prefill_address, call) as frames:
            await _read(pull, runner, call, frames, tell)
    except TandemError as error:
        pull.error = error


async def _read(
    pull: Pull, runner: Runner, call: PrefillCall, frames: AsyncIterator[Frame], tell: Callable[[News], None]
) -> None:
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
                runner.import_blocks(target, first_slot, frame.layers, frame.block_tokens, payload, begin.layout.dtype)
            case FirstToken():
                if len(frame.sampled) != call.params.n:
                    raise TransferFailed(f"{len(frame.sampled)} first tokens came for {call.params.n} choices")
                tell(First(pull, frame))
            case End():
                if not receiver.complete:
                    raise TransferFailed("KV stream ended before all KV was there")
                tell(Arrived(pull, frame))
                return
            case Begin():
                raise TransferFailed("KV stream begins twice")
    raise TransferFailed("KV stream stopped without End")
