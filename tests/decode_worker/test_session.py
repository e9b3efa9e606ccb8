"""A gateway that does not read: its events gather, and from a number on its commands wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from decode_worker.commands import read_commands
from decode_worker.messages import Message
from decode_worker.session import Session
from decode_worker.stream import Command, Submit
from engine.inbox import Inbox
from engine.sampling import SamplingParams


async def test_a_gateway_that_does_not_read_is_not_read_either() -> None:
    session, inbox, sent = Session("s", many_events=10), Inbox[Message](limit=0), 0

    async def commands() -> AsyncIterator[Command]:
        nonlocal sent
        while sent < 1000:
            sent += 1
            yield Submit(f"r{sent}", (1,), SamplingParams(), seed=0)
            await asyncio.sleep(0)

    # The inbox is full: each command is refused, which is an event to read.
    reading = asyncio.create_task(read_commands(session, commands(), inbox, lambda: 0))
    await asyncio.sleep(0.01)
    assert sent == 11
    events = [event async for frame in session.frames() for event in frame.events]
    assert len(events) == sent == 1000
    await reading
