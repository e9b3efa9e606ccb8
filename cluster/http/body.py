"""What a client sends, and whether it is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from cluster.openai.errors import BodyTooLarge
from engine.errors import Cancelled

Result = TypeVar("Result")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """All of it. Raises BodyTooLarge for one that is, of which no more is read, and Cancelled when its
    sender goes away."""
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise BodyTooLarge(int(stated), max_bytes)
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client has gone")
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise BodyTooLarge(len(body), max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` comes to. Cancels it when the client disconnects, and raises Cancelled. For after the body was read.

    Raises what `work` raises.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client has gone")
    finally:
        # Also when this is cancelled itself: nothing may go on for a caller who is not there.
        for each in (task, gone):
            each.cancel()
        await asyncio.wait([task, gone])
        if not task.cancelled():
            # Looked at even when whoever asked has gone, or asyncio would complain that nobody did.
            task.exception()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
