"""An OpenAI-compatible server on asyncio streams that says what it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

MODELS = {"data": [{"id": "tiny", "max_model_len": 512}]}
# The body of a request → status, and what to send: objects are events, text is sent as it is, floats are pauses,
# events of asyncio are waited for.
Behaviour = Callable[[dict[str, Any]], tuple[int, list[Any]]]


class FakeOpenAI:
    """`bodies` are those that came, with their paths; `cut` counts clients that went away in mid-answer."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour, self.url = behaviour, ""
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.cut = 0
        self.tasks: set[asyncio.Task[Any]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            while line := await reader.readline():
                path = line.split()[1].decode()
                headers = {}
                while header := (await reader.readline()).strip():
                    name, _, value = header.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
                self.headers.append(headers)
                await self._answer(path, body, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.cut += 1
        finally:
            writer.close()

    async def _answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            status, pieces = 200, [json.dumps(MODELS)]
        else:
            self.bodies.append((path, body))
            status, pieces = self.behaviour(body)
        writer.write(f"HTTP/1.1 {status} X\r\nretry-after: 7\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for piece in pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
                continue
            if isinstance(piece, asyncio.Event):
                await piece.wait()
                continue
            text = piece if isinstance(piece, str) else f"data: {json.dumps(piece)}\n\n"
            data = text.encode()
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@asynccontextmanager
async def openai_server(behaviour: Behaviour) -> AsyncIterator[FakeOpenAI]:
    fake = FakeOpenAI(behaviour)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield fake
    finally:
        server.close()
        for task in fake.tasks:
            task.cancel()
        await asyncio.gather(*fake.tasks, return_exceptions=True)


def completion(*texts: str, gap_s: float = 0.0, usage: bool = True) -> list[Any]:
    """A stream of these texts, one event each, and its end."""
    events: list[Any] = []
    for text in texts:
        events += [gap_s, {"choices": [{"index": 0, "text": text}]}]
    if usage:
        details = {"cached_tokens": 3}
        counts = {"prompt_tokens": 11, "completion_tokens": len(texts), "prompt_tokens_details": details}
        events.append({"choices": [], "usage": counts})
    return [*events, "data: [DONE]\n\n"]
