"""The token stream over gRPC: the gateway's side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeAlias

import grpc.aio

from decode_worker.convert import command_to_bytes, frame_from_bytes
from decode_worker.stream import Command, TokenFrame
from engine.errors import TandemError, Unavailable
from kvtransfer.rpc import MessageReader, rpc_errors
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_version import SPOKEN, Versions, agree_with_server

METHOD = "/tandem.v1.DecodeWorker/Attach"
AttachMethod: TypeAlias = "grpc.aio.StreamStreamMultiCallable[bytes, bytes]"


class GrpcDecodeTransport:
    """Implements decode_worker.stream.DecodeTransport. One channel per address; belongs to one event loop."""

    def __init__(
        self, channels: Channels | None = None, *, connect_timeout_s: float = 10.0, spoken: Versions = SPOKEN
    ) -> None:
        self._channels = channels if channels is not None else Channels()
        self._spoken = spoken
        self._connect_timeout_s = connect_timeout_s

    @asynccontextmanager
    async def attach(self, address: str) -> AsyncIterator[GrpcDecodeSession]:
        """Raises Unavailable when the worker cannot be reached or does not answer; leaving ends the stream. What a
        worker refuses with shows here or in the first frame asked for, whichever gRPC learns first. One that
        speaks no version of the protocol that is spoken here shows as VersionMismatch, in the first frame asked for at
        the latest."""
        with self._channels.use(address) as channel:
            method: AttachMethod = channel.stream_stream(METHOD)
            rpc = method(metadata=self._spoken.metadata)
            session = GrpcDecodeSession(rpc, address, self._spoken)
            try:
                try:
                    async with asyncio.timeout(self._connect_timeout_s), rpc_errors():
                        await rpc.wait_for_connection()
                except TimeoutError:
                    text = f"decode worker {address} did not answer within {self._connect_timeout_s:g} s"
                    raise Unavailable(text) from None
                yield session
            finally:
                rpc.cancel()
                await session.close()

    async def close(self) -> None:
        """Ends all open streams."""
        await self._channels.close()


class GrpcDecodeSession:
    """Implements decode_worker.stream.DecodeSession."""

    def __init__(self, rpc: grpc.aio.StreamStreamCall[bytes, bytes], address: str, spoken: Versions) -> None:
        self._rpc = rpc
        self._address = address
        self._turn = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()
        agree = partial(agree_with_server, rpc, spoken, f"the decode worker at {address}")
        self._frames = MessageReader(rpc, frame_from_bytes, agree)

    async def send(self, command: Command) -> None:
        """Returns when flow control has accepted the command. Raises Unavailable when the stream is gone.

        Many tasks may send at once. One that is cancelled while it waits may still have its command sent.
        """
        # Cancelling a write would make gRPC cancel the whole stream, and every other request with it.
        write = asyncio.create_task(self._write(command_to_bytes(command)))
        self._writes.add(write)
        write.add_done_callback(self._written)
        await asyncio.shield(write)

    def frames(self) -> AsyncIterator[TokenFrame]:
        """One stream: every call gives the same iterator."""
        return self._frames

    async def close(self) -> None:
        """Waits for the writes that the end of the call cut short."""
        if self._writes:
            await asyncio.wait(self._writes)

    async def _write(self, message: bytes) -> None:
        try:
            async with self._turn, rpc_errors():
                await self._rpc.write(message)
        except TandemError as error:
            raise Unavailable(f"the stream to decode worker {self._address} is gone: {error}") from error

    def _written(self, write: asyncio.Task[None]) -> None:
        self._writes.discard(write)
        # Looked at even when the sender has gone, or asyncio would complain that nobody did.
        if not write.cancelled():
            write.exception()
