"""The command line's calls of a service: requests out, answers as plain values back, errors as TandemErrors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.message import Message
from tandem.client import Client, GenerateChunk, Prompt, Sampling
from tandem.v1.inference_pb2 import GenerateComplete

from cluster.prompt_file import PromptLine
from engine.errors import ConfigError, TandemError, Unavailable
from kvtransfer.rpc import ERROR_KEY, error_from_rpc


@dataclass(frozen=True, slots=True)
class Result:
    """The end of one request: its answer, or what went wrong."""

    line: PromptLine
    answer: dict[str, Any] | None = None
    error: TandemError | None = None

    def as_json(self) -> dict[str, Any]:
        if self.error is not None:
            return {"id": self.line.id, "error": {"type": type(self.error).__name__, "message": str(self.error)}}
        return {"id": self.line.id, **(self.answer or {})}


class RunningRequest:
    """One request under way. Its text can be read while it comes; its result is there at the end."""

    def __init__(self, client: Client, url: str, line: PromptLine, sampling: Sampling) -> None:
        # Bounded by the answer: at most one chunk per token, and the end.
        self._chunks: asyncio.Queue[GenerateChunk | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(client, url, line, sampling))

    async def chunks(self) -> AsyncIterator[GenerateChunk]:
        """The pieces of the answer, as they come, until it ends."""
        while (chunk := await self._chunks.get()) is not None:
            yield chunk

    async def result(self) -> Result:
        return await self._task

    async def cancel(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self, client: Client, url: str, line: PromptLine, sampling: Sampling) -> Result:
        answer: dict[str, Any] | None = None
        try:
            async with service_errors(url):
                async for part in client.generate(prompt_of(line), **sampling):
                    if isinstance(part, GenerateChunk):
                        self._chunks.put_nowait(part)
                    else:
                        answer = answer_of(part)
        except TandemError as error:
            return Result(line, error=error)
        finally:
            self._chunks.put_nowait(None)
        return Result(line, answer)


@asynccontextmanager
async def service_errors(url: str) -> AsyncIterator[None]:
    """Around calls of the service at `url`: what gRPC raises leaves as a TandemError."""
    try:
        yield
    except grpc.aio.AioRpcError as raised:
        metadata = raised.trailing_metadata()
        if raised.code() is grpc.StatusCode.UNAVAILABLE and (metadata is None or ERROR_KEY not in metadata):
            raise ConfigError(f"--url {url}: no service answers there: {raised.details()}") from raised
        error = error_from_rpc(raised)
        if isinstance(error, Unavailable):
            raise Unavailable(f"--url {url}: {error}") from raised
        raise error from raised


def prompt_of(line: PromptLine) -> Prompt:
    """A prompt as the client takes it."""
    if isinstance(line.prompt, str):
        return line.prompt
    chat = [{"role": turn[0], "content": turn[1]} for turn in line.prompt if isinstance(turn, tuple)]
    return chat or [token_id for token_id in line.prompt if isinstance(token_id, int)]


def answer_of(complete: GenerateComplete) -> dict[str, Any]:
    """The first choice of an answer, as `tandem generate --json` prints it."""
    choice = complete.choices[0]
    return {
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "usage": plain(complete.usage),
        "receipt": plain(complete.receipt),
    }


def plain(message: Message) -> dict[str, Any]:
    """Every field of a message under its own name, those at their default included, and numbers as numbers: protobuf's
    own conversion leaves the first out and makes 64-bit integers strings."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        values[field.name] = [_item(item) for item in value] if field.is_repeated else _item(value)
    return values


def _item(value: Any) -> Any:  # noqa: ANN401 - a field of any type
    return plain(value) if isinstance(value, Message) else value
