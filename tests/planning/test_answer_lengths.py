"""Answers end where the trace says, and only the worker that computes them is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.planning.answer_lengths import EndingTransport
from decode_worker.stream import Cancel, Command, DecodeSession, Submit, TokenFrame
from engine.sampling import SamplingParams


class Recorder:
    """A transport, and its one session, that keep what they were given."""

    def __init__(self) -> None:
        self.sent: list[Command] = []
        self.addresses: list[str] = []
        self.is_closed = False

    @asynccontextmanager
    async def attach(self, address: str) -> AsyncIterator[DecodeSession]:
        self.addresses.append(address)
        yield self

    async def send(self, command: Command) -> None:
        self.sent.append(command)

    async def frames(self) -> AsyncIterator[TokenFrame]:
        yield TokenFrame(7, ())

    async def close(self) -> None:
        self.is_closed = True


def test_submits_get_their_length_and_nothing_else_is_touched() -> None:
    inner = Recorder()
    submit = Submit("r3#1", (5, 6), SamplingParams(max_tokens=500, ignore_eos=True), seed=9)

    async def main() -> list[TokenFrame]:
        transport = EndingTransport(inner, {"r3#1": 12}.__getitem__)
        async with transport.attach("decode-0") as session:
            await session.send(submit)
            await session.send(Cancel("r3#1"))
            frames = [frame async for frame in session.frames()]
        await transport.close()
        return frames

    assert asyncio.run(main()) == [TokenFrame(7, ())]
    changed, cancel = inner.sent
    assert isinstance(changed, Submit)
    assert changed.params == SamplingParams(max_tokens=12, ignore_eos=True)
    assert (changed.request_id, changed.token_ids, changed.seed) == ("r3#1", (5, 6), 9)
    assert cancel == Cancel("r3#1")
    assert submit.params.max_tokens == 500
    assert inner.addresses == ["decode-0"]
    assert inner.is_closed
