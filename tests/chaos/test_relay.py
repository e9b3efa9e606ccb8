"""The relay: whose links a fault is on, and what becomes of bytes and connections on them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest

from cluster.chaos.relay import Relay, Weather, running_relay
from tests.eventually import eventually

CUT = Weather(is_cut=True)
SILENT_S = 0.2


class Echo:
    """A server that says back what it hears, in capitals."""

    def __init__(self) -> None:
        self.address = ""
        self.heard = b""
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        while data := await reader.read(1 << 16):
            self.heard += data
            writer.write(data.upper())
        self.connections -= 1
        writer.close()


@asynccontextmanager
async def echo_behind_relay() -> AsyncIterator[tuple[Echo, Relay]]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    echo.address = "{}:{}".format(*server.sockets[0].getsockname())
    names = {echo.address: "prefill-0"}
    try:
        async with running_relay(lambda address: names.get(address, "")) as relay:
            yield echo, relay
    finally:
        server.close()
        await eventually(lambda: echo.connections == 0)


class Peer:
    """Somebody who has connected through the relay."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def says(self, text: bytes) -> bytes:
        self.writer.write(text)
        return await self.reader.readexactly(len(text))

    async def hears_nothing(self) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENT_S):
                await self.reader.read(1)


@asynccontextmanager
async def connected(relay: Relay, name: str, address: str) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection(*relay.address.split(":"))
    user = base64.b64encode(name.encode()).decode()
    head = f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\nProxy-Authorization: Basic {user}\r\n\r\n"
    writer.write(head.encode())
    try:
        yield Peer(reader, writer)
    finally:
        writer.close()


@asynccontextmanager
async def accepted(relay: Relay, name: str, address: str) -> AsyncIterator[Peer]:
    async with connected(relay, name, address) as peer:
        assert (await peer.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        yield peer


async def test_bytes_pass() -> None:
    async with echo_behind_relay() as (echo, relay), accepted(relay, "decode-0", echo.address) as peer:
        assert await peer.says(b"hello") == b"HELLO"
        big = b"x" * (8 << 20)
        peer.writer.write(big)
        assert await peer.reader.readexactly(len(big)) == big.upper()


async def test_a_cut_link_is_silent_and_goes_on_where_it_was() -> None:
    async with echo_behind_relay() as (echo, relay), accepted(relay, "decode-0", echo.address) as peer:
        with relay.disturbed("decode-0", "any", CUT):
            peer.writer.write(b"one two")
            await peer.hears_nothing()
            assert (echo.heard, echo.connections) == (b"", 1)
        assert await peer.reader.readexactly(7) == b"ONE TWO"


@pytest.mark.parametrize(
    ("worker_id", "peer", "is_cut"),
    [
        ("decode-0", "any", True),
        ("decode-0", "prefill", True),
        ("decode-0", "prefill-0", True),
        ("decode-0", "prefill-1", False),
        ("decode-0", "gateway", False),
        ("decode-1", "any", False),
        ("prefill-0", "any", True),
        ("prefill-0", "decode", True),
        ("prefill-0", "decode-0", True),
        ("prefill-0", "decode-1", False),
    ],
)
async def test_a_fault_finds_its_links_by_either_end(worker_id: str, peer: str, is_cut: bool) -> None:
    async with echo_behind_relay() as (echo, relay), accepted(relay, "decode-0", echo.address) as other:
        with relay.disturbed(worker_id, peer, CUT):
            if is_cut:
                other.writer.write(b"hello")
                await other.hears_nothing()
            else:
                assert await other.says(b"hello") == b"HELLO"


async def test_an_end_is_heard_of_when_the_cut_is_over() -> None:
    async with echo_behind_relay() as (echo, relay), accepted(relay, "decode-0", echo.address) as peer:
        with relay.disturbed("prefill-0", "any", CUT):
            peer.writer.close()
            await asyncio.sleep(SILENT_S)
            assert echo.connections == 1
        await eventually(lambda: echo.connections == 0)


async def test_a_peer_that_breaks_off_is_heard_of() -> None:
    async with echo_behind_relay() as (echo, relay), accepted(relay, "decode-0", echo.address) as peer:
        await peer.says(b"hello")
        echo.writers[0].transport.abort()
        assert await peer.reader.read() == b""


async def test_who_connects_during_a_cut_waits() -> None:
    async with echo_behind_relay() as (echo, relay), AsyncExitStack() as stack:
        with relay.disturbed("prefill-0", "any", CUT):
            async with connected(relay, "decode-0", echo.address) as impatient:
                await impatient.hears_nothing()
            patient = await stack.enter_async_context(connected(relay, "decode-1", echo.address))
            await patient.hears_nothing()
            assert echo.connections == 0
        assert (await patient.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert await patient.says(b"hello") == b"HELLO"


async def test_nobody_there() -> None:
    async with echo_behind_relay() as (_, relay), connected(relay, "decode-0", "127.0.0.1:1") as peer:
        assert (await peer.reader.read()).startswith(b"HTTP/1.1 502 ")


async def test_whatever_is_no_request_to_connect_is_broken_off() -> None:
    async with echo_behind_relay() as (_, relay):
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"CONNECT nowhere HTTP/1.1\r\n\r\n", b"x" * (1 << 18)):
            reader, writer = await asyncio.open_connection(*relay.address.split(":"))
            writer.write(text)
            # Reset, where more was sent than was read.
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()


async def test_a_slow_link_takes_its_time_either_way() -> None:
    async with echo_behind_relay() as (echo, relay), accepted(relay, "decode-0", echo.address) as peer:
        loop = asyncio.get_running_loop()
        with relay.disturbed("decode-0", "any", Weather(delay_s=0.1)):
            start_s = loop.time()
            assert await peer.says(b"hello") == b"HELLO"
            assert loop.time() - start_s >= 0.2
        with relay.disturbed("prefill-0", "decode", Weather(bytes_per_s=1e6)):
            start_s = loop.time()
            await peer.says(b"x" * 200_000)
            assert loop.time() - start_s >= 0.2
