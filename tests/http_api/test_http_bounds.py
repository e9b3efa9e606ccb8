"""Connections that mean ill, or do not know better: each costs little, is told, and disturbs nobody."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
import uvloop
from pydantic import BaseModel, ValidationError

from cluster.http import protocol
from cluster.http.model_facts import DetokenizeRequest, TokenizeRequest
from cluster.openai.chat_request import ChatRequest
from cluster.openai.completion_request import CompletionRequest
from cluster.security.certs import make_certs
from kvtransfer.rpc_tls import Tls
from tests.http_api.web import MAX_BODY_BYTES, Web, eventually, web

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Count!"}]}


@asynccontextmanager
async def connection(running: Web) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
    try:
        yield reader, writer
    finally:
        writer.close()


def request(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: a", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def ended(reader: asyncio.StreamReader) -> bytes:
    """All that still comes, until the other side ends the connection."""
    async with asyncio.timeout(5):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


HEALTH = b"GET /health HTTP/1.1\r\n\r\n"
# The last ones begin behind a request that is answered.
BEGINNINGS = [b"", b"POST /v1/chat/comp", request(b"x" * 100)[:-50]]
BEGINNINGS += [HEALTH + beginning for beginning in BEGINNINGS[1:]]


@pytest.mark.parametrize("beginning", BEGINNINGS)
async def test_a_request_that_never_ends(beginning: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REQUEST_S", 0.2)
    async with web() as running, connection(running) as (reader, writer), httpx.AsyncClient() as other:
        writer.write(beginning)
        assert (await ended(reader)).count(b"HTTP/1.1 200 OK") == beginning.count(HEALTH)
        assert (await other.post(f"{running.url}/chat/completions", json=CHAT)).status_code == 200


async def test_a_slow_request_that_comes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REQUEST_S", 2.0)
    async with web() as running, connection(running) as (reader, writer):
        # Twice: between requests no time counts.
        for _ in range(2):
            for byte in request(json.dumps(CHAT).encode()):
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))


@pytest.mark.parametrize(
    "head",
    [
        request(b"", *(f"x-{number}: {'a' * 200}" for number in range(100))),
        b"GET /health HTTP/1.1\r\nx-long: " + b"a" * (1 << 17),
        b"GET /health HTTP/1.1\r\n" + b"a" * (1 << 20),
        b"GET /" + b"a" * (1 << 17),
        b"GET /health HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-trailer: " + b"a" * (1 << 17),
    ],
    ids=["many", "value", "name", "path", "trailer"],
)
async def test_headers_that_never_end(head: bytes) -> None:
    async with web() as running, connection(running) as (reader, writer):
        answering = asyncio.create_task(ended(reader))
        for at in range(0, len(head), 4096):
            if answering.done():
                break
            writer.write(head[at : at + 4096])
            await asyncio.wait([answering], timeout=0.02)
        answer = await answering
    assert b"HTTP/1.1 431 " in answer
    assert b"more than 16384 bytes of headers" in answer
    assert at < 40_000


async def test_headers_of_almost_the_limit_may_come_in_pieces() -> None:
    async with web() as running, connection(running) as (reader, writer):
        for byte in b"GET /health HTTP/1.1\r\nconnection: close\r\nx-long: " + b"a" * 16_300 + b"\r\n\r\n":
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await ended(reader)).startswith(b"HTTP/1.1 200 ")


async def test_what_is_no_request() -> None:
    async with web() as running, connection(running) as (reader, writer):
        writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n")
        answer = await ended(reader)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"this is no HTTP request" in answer


@pytest.mark.parametrize("is_stated", [True, False])
async def test_a_body_that_is_too_large(is_stated: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * (MAX_BODY_BYTES // 16)

    content = b"x" * (4 * MAX_BODY_BYTES) if is_stated else pieces()
    async with web() as running, httpx.AsyncClient() as client:
        answer = await client.post(f"{running.url}/chat/completions", content=content)
    assert answer.status_code == 413
    assert f"at most {MAX_BODY_BYTES}" in answer.json()["error"]["message"]


MANY = 5000
ELEMENTS = b"[" + b"{}," * MANY + b"{}]"
KEYS = b"{" + b",".join(b'"%x":""' % number for number in range(MANY)) + b"}"
MESSAGES = b'{"messages":[{"role":"user","content":"a"}],'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, b'{"prompt":' + ELEMENTS + b"}"),
        (CompletionRequest, b'{"prompt":[' + ELEMENTS + b"]}"),
        (CompletionRequest, b'{"prompt":"a","stop":' + ELEMENTS + b"}"),
        (CompletionRequest, b'{"prompt":"a","stop_token_ids":' + ELEMENTS + b"}"),
        (CompletionRequest, b'{"prompt":"a","guided_choice":' + ELEMENTS + b"}"),
        (ChatRequest, b'{"messages":' + ELEMENTS + b"}"),
        (ChatRequest, b'{"messages":[{"role":"user","content":' + ELEMENTS + b"}]}"),
        (ChatRequest, b'{"messages":[{"role":"assistant","tool_calls":' + ELEMENTS + b"}]}"),
        (ChatRequest, MESSAGES + b'"tools":' + ELEMENTS + b"}"),
        (ChatRequest, MESSAGES + b'"modalities":' + ELEMENTS + b"}"),
        (TokenizeRequest, b'{"messages":' + ELEMENTS + b"}"),
        (TokenizeRequest, MESSAGES + b'"tools":' + ELEMENTS + b"}"),
        (DetokenizeRequest, b'{"tokens":' + ELEMENTS + b"}"),
    ],
)
def test_a_list_is_read_to_its_first_wrong_element(kind: type[BaseModel], body: bytes) -> None:
    with pytest.raises(ValidationError) as raised:
        kind.model_validate_json(body)
    # One for each branch of a union, and for each field of the first element.
    assert raised.value.error_count() <= 4


@pytest.mark.parametrize(
    "body", [KEYS, b'{"prompt":"a","logit_bias":' + KEYS + b"}", b'{"prompt":"a","stream_options":' + KEYS + b"}"]
)
async def test_what_is_wrong_with_a_body_is_not_listed_without_end(body: bytes) -> None:
    async with web() as running, httpx.AsyncClient() as client:
        answer = await client.post(f"{running.url}/completions", content=body)
    assert answer.status_code == 400
    # The prompt that one of them lacks is a problem too.
    assert re.search(rf"got '({MANY}|{MANY + 1}) wrong or unknown fields'", answer.text)


async def test_a_reader_that_stops_costs_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SLOWEST_BYTES_PER_S", 1 << 20)
    async with web("a" * 4000, slow_reader_s=0.3) as running, httpx.AsyncClient() as other:
        asked = {**CHAT, "stream": True, "max_tokens": 900, "n": 8, "logprobs": True}
        silent = socket.socket()
        # Small, or the kernel would take the whole answer.
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        silent.connect(("127.0.0.1", running.server.port))
        silent.sendall(request(json.dumps(asked).encode()))
        await eventually(lambda: running.fake.running)
        quick = await other.post(f"{running.url}/chat/completions", json={**CHAT, "max_tokens": 3})
        assert quick.status_code == 200
        # Long before the answer's end: its reader has gone as far as anybody can tell.
        await eventually(lambda: running.fake.cancels, timeout_s=8)
        silent.close()


@pytest.mark.parametrize("last", [b"", b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n", b"?\r\n\r\n", None])
async def test_a_connection_ends_although_its_answers_are_not_read(
    last: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "SLOWEST_BYTES_PER_S", 1 << 20)
    monkeypatch.setattr("cluster.http.server.SEND_BUFFER_BYTES", 4096)
    monkeypatch.setattr("cluster.http.server.KEEP_ALIVE_S", 0.3 if last == b"" else 60)
    async with web(slow_reader_s=0.3) as running:
        with socket.socket() as silent:
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            silent.connect(("127.0.0.1", running.server.port))
            state = running.server._server.server_state
            await eventually(lambda: state.connections)
            (transport,) = (each.transport for each in state.connections)
            # Too little to make its writer wait.
            for sent in range(1000):
                if transport.get_write_buffer_size() > 1000:
                    break
                silent.sendall(HEALTH)
                await eventually(lambda: state.total_requests > sent)  # noqa: B023 - it is waited for here
            assert 1000 < transport.get_write_buffer_size() < protocol.WRITE_BUFFER_BYTES
            if last is None:
                silent.shutdown(socket.SHUT_WR)
            else:
                silent.sendall(last)
            await eventually(lambda: not state.connections)


async def test_a_reader_that_is_slow_but_reads_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SLOWEST_BYTES_PER_S", 100 << 10)
    asked = {**CHAT, "stream": True, "max_tokens": 100, "n": 64, "logprobs": True}
    async with web("a" * 4000, slow_reader_s=1.0) as running, connection(running) as (reader, writer):
        writer.write(request(json.dumps(asked).encode(), "connection: close"))
        answer = b""
        while piece := await reader.read(16 << 10):
            answer += piece
            await asyncio.sleep(0.01)
    assert answer.count(b'"finish_reason":"length"') == 64


async def test_connections_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.http.server.max_connections", lambda: 2)
    async with web() as running, connection(running) as first, connection(running) as second:
        for reader, writer in (first, second):
            writer.write(b"GET /health HTTP/1.1\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        async with connection(running) as (reader, _):
            assert await ended(reader) == b""
        first[1].close()
        async with asyncio.timeout(5), httpx.AsyncClient() as other:
            while True:
                with suppress(httpx.TransportError):
                    assert (await other.get(f"{running.root}/health")).status_code == 200
                    break


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_connections_without_a_handshake_are_within_the_limit_and_have_as_long_as_a_request(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.http.server.max_connections", lambda: 3)
    monkeypatch.setattr("cluster.http.accepting.REQUEST_S", 0.5)
    make_certs(tmp_path, ["127.0.0.1"], days=1)
    folder = tmp_path / "clients"
    trusted = ssl.create_default_context(cafile=str(folder / "ca.crt"))

    async def check() -> None:
        async with (
            web(tls=Tls(folder)) as running,
            connection(running) as (first, writer),
            connection(running) as (second, _),
            connection(running) as (third, _),
            connection(running) as (fourth, _),
        ):
            writer.write(b"no handshake")
            # At once: the first for what it said, the last for being one too many.
            for reader in (first, fourth):
                async with asyncio.timeout(0.4):
                    await ended(reader)
            # Its place is free again.
            async with httpx.AsyncClient(verify=trusted) as client:
                assert (await client.get(f"https://{running.server.address}/health")).status_code == 200
            for reader in (second, third):
                assert await ended(reader) == b""
            async with connection(running):
                # With one in its handshake the server ends as soon as without.
                async with asyncio.timeout(1.0):
                    await running.server.stop()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(check())


async def test_pipelined_requests_are_answered_in_turn() -> None:
    async with web() as running, connection(running) as (reader, writer):
        writer.write(request(json.dumps(CHAT).encode()) * 2 + b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n")
        answer = await ended(reader)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.endswith(b'{"status":"ok"}')


@pytest.mark.parametrize("protocols", ["h2c", "websocket", "h2c, websocket"])
async def test_an_upgrade_is_passed_over(protocols: str) -> None:
    headers = ("connection: Upgrade, HTTP2-Settings", f"upgrade: {protocols}", "http2-settings: AAMAAABkAAQAAP__")
    asked = json.dumps({**CHAT, "user": "GET /health HTTP/1.1\r\n\r\n"}).encode()
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(asked), asked)
    head = request(b"", *headers).replace(b"content-length: 0", b"transfer-encoding: chunked")
    async with web() as running, connection(running) as (reader, writer):
        writer.write(request(asked, *headers) + request(asked) + head + chunked)
        # Also when the body comes later than its head, and is a request by itself.
        body = b"GET /v1/models HTTP/1.1\r\n\r\n"
        parts = [request(body, *headers)[: -len(body)], body, b"GET /health HTTP/1.1\r\n"]
        parts.append("\r\n".join([*headers, "connection: close", "", ""]).encode())
        for part in parts:
            await asyncio.sleep(0.01)
            writer.write(part)
        answer = await ended(reader)
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"200", b"200", b"200", b"400", b"200"]
    assert answer.endswith(b'{"status":"ok"}')


async def test_there_is_no_tunnel() -> None:
    async with web() as running, connection(running) as (reader, writer):
        writer.write(b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n" + HEALTH)
        answer = await ended(reader)
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"400"]


async def test_more_pipelined_requests_than_anybody_needs() -> None:
    async with web("a" * 500) as running, connection(running) as (reader, writer):
        writer.write(request(json.dumps({**CHAT, "max_tokens": 400}).encode()) + HEALTH * 32)
        assert await ended(reader) == b""
        await running.until_idle()
        assert len(running.fake.cancels) <= 1


async def test_who_sends_the_next_request_and_goes_away_has_gone_for_all_of_them() -> None:
    async with web("a" * 500) as running:
        async with connection(running) as (_, writer):
            long = json.dumps({**CHAT, "max_tokens": 400}).encode()
            writer.write(request(long) * 2)
            await eventually(lambda: running.fake.running)
        await running.until_idle()
        assert len(running.fake.cancels) == 1, "the second one had not begun"
