"""A prefill side that stops where a test wants it to, and a decode worker with a gateway's stream attached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import cast

from decode_worker.config import DecodeConfig
from decode_worker.stream import Command, Event, TokenFrame
from decode_worker.worker import DecodeWorker
from engine.emulated_runner import EmulatedRunner
from engine.errors import TandemError, Unavailable
from kvtransfer.frames import Arrival, Begin, Damaged, End, FirstToken, Frame, KVBlocks
from kvtransfer.transport import PrefillCall
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker
from tests.emulated import runner, running


class ScriptedTransport:
    """Passes a real prefill worker's frames on, up to the first of class `hold`; then waits, fails or tampers.

    `hold` None lets everything pass. `fault` is raised instead of waiting. `twice` sends each KV frame again. Frames
    for which `damages` says so arrive damaged; it gets the number of the call, from 1, and the frame. `change` makes
    another frame of one.
    """

    def __init__(self) -> None:
        self.prefill = PrefillWorker(runner(64), PrefillConfig(token_budget=8), worker_id="p", max_context=1 << 16)
        self.hold: type[Frame] | None = None
        self.fault: TandemError | None = None
        self.twice = False
        self.damages: Callable[[int, Frame], bool] = lambda call, frame: False
        self.change: Callable[[Frame], Frame] = lambda frame: frame
        self.calls: list[PrefillCall] = []

    @asynccontextmanager
    async def open(self, address: str, call: PrefillCall) -> AsyncIterator[AsyncIterator[Arrival]]:
        if address != "p":
            raise Unavailable(f"nobody at {address}")
        self.calls.append(call)
        async with aclosing(cast(AsyncGenerator[Frame, None], self.prefill.prefill(call))) as frames:
            yield self._pass(frames, len(self.calls))

    async def close(self) -> None:
        """Nothing is kept between calls."""

    async def _pass(self, frames: AsyncIterator[Frame], call: int) -> AsyncIterator[Arrival]:
        async for frame in frames:
            if self.damages(call, frame):
                yield Damaged("KV frame checksum mismatch")
                continue
            if self.hold is not None and isinstance(frame, self.hold):
                if self.fault is not None:
                    raise self.fault
                await asyncio.get_running_loop().create_future()
            yield self.change(frame)
            if self.twice and isinstance(frame, KVBlocks):
                yield frame


class Gateway:
    """One attached token stream. `events` is everything that came, in order."""

    def __init__(self, worker: DecodeWorker) -> None:
        self._worker = worker
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self.frames: list[TokenFrame] = []
        self._reader = asyncio.create_task(self._read())

    @property
    def events(self) -> list[Event]:
        return [event for frame in self.frames for event in frame.events]

    def send(self, command: Command) -> None:
        self._commands.put_nowait(command)

    async def detach(self) -> None:
        self._reader.cancel()
        await asyncio.wait([self._reader])

    async def _read(self) -> None:
        async def commands() -> AsyncIterator[Command]:
            while True:
                yield await self._commands.get()

        stream = cast(AsyncGenerator[TokenFrame, None], self._worker.attach(commands()))
        async with aclosing(stream):
            async for frame in stream:
                self.frames.append(frame)


@asynccontextmanager
async def scene(
    num_blocks: int = 64, decode_runner: EmulatedRunner | None = None, **limits: int
) -> AsyncIterator[tuple[ScriptedTransport, DecodeWorker, Gateway, EmulatedRunner]]:
    """Both loops running, one gateway attached; at the end everything must be empty on both sides."""
    transport = ScriptedTransport()
    decode_runner = decode_runner or runner(num_blocks)
    worker = DecodeWorker(
        decode_runner,
        DecodeConfig(**limits),
        transport,
        worker_id="d",
        eos_token_ids=frozenset({0}),
        max_context=256,
    )
    async with running(transport.prefill.run(), worker.run()):
        gateway = Gateway(worker)
        try:
            yield transport, worker, gateway, decode_runner
        finally:
            await gateway.detach()
            await asyncio.sleep(0.5)
        worker.check_empty()
        transport.prefill.check_empty()


PHASES: dict[str, type[Frame] | None] = {
    "pulling": Begin,
    "receiving": KVBlocks,
    "before first token": FirstToken,
    "before end": End,
    "decoding": None,
}
