"""One HTTP connection: uvicorn's, with the bounds that it lacks (docs/limits.md lists them).

    connected ─▶ headers ─▶ body ─▶ answer ─▶ idle ─▶ headers …
                 └── request_s ──┘  └ slow_reader_s of waiting for the reader, and 1 s per KiB
                                               └ keep_alive_s

Beyond its time a connection is aborted, and what was computed for it is cancelled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from cluster.openai.answer import to_json
from cluster.openai.errors import http_error

MAX_HEADER_BYTES = 16 << 10
REQUEST_S = 20.0
# Slower readers than this pay from `slow_reader_s`.
SLOWEST_BYTES_PER_S = 1 << 10
# Requests of one connection that are not answered yet.
MAX_PIPELINED = 32
# Of an answer, before whoever writes it has to wait for its reader.
WRITE_BUFFER_BYTES = 16 << 10


class BoundedProtocol(HttpToolsProtocol):
    """`opened` is called when the connection is. How many there may be: accepting.py."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        slow_reader_s: float,
        opened: Callable[[], None],
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._slow_reader_s = slow_reader_s
        self._opened = opened
        self._header_bytes, self._is_too_large = 0, False
        # Since the parser last told of anything: it keeps a header until that is whole.
        self._untold_bytes = 0
        self._is_receiving = False
        # Requests that are not answered yet, in order.
        self._cycles: deque[RequestResponseCycle] = deque()
        self._request_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        # How long its reader has kept this connection waiting beyond what a slow link takes; until when it may do so
        # now if it takes nothing, and since when it does.
        self._waited_s, self._allowed_s, self._waits_since_s = 0.0, 0.0, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._opened()
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)
        # Of requests that come before the answer to the last, uvicorn tells only the latest that its client has gone.
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        if self._request_timer is None and self._is_between_requests():
            self._expect_request()
        self._unset_keepalive_if_required()
        try:
            while data:
                data = self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._untold_bytes > MAX_HEADER_BYTES:
            self._is_too_large = True
            self.send_400_response("")

    def _feed(self, data: bytes) -> bytes:
        """What of `data` is still to be read."""
        self._untold_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # Passed over, as RFC 9110 allows. The parser has passed over the body as well, and would take it for the
            # next request: one that knows of no upgrade reads the same again.
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            return head + data[upgrade.args[0] :]
        return b""

    def _head_without_upgrade(self) -> bytes:
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([first, *lines, b"", b""])

    def on_message_begin(self) -> None:
        self._header_bytes = self._untold_bytes = 0
        self._is_receiving = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")
            return
        super().on_headers_complete()
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)
        if len(self._cycles) > MAX_PIPELINED:
            self._abort()
            raise ValueError(f"more than {MAX_PIPELINED} requests that are not answered")

    def on_body(self, body: bytes) -> None:
        self._untold_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_receiving = False
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        super().on_message_complete()

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_request(self) -> None:
        self._request_timer = self.loop.call_later(REQUEST_S, self._abort)

    def _count_header(self, count: int) -> None:
        self._untold_bytes = 0
        self._header_bytes += count
        if self._header_bytes > MAX_HEADER_BYTES:
            self._is_too_large = True
            # The parser stops at whatever is raised, and `send_400_response` is asked for.
            raise ValueError(f"more than {MAX_HEADER_BYTES} bytes of headers")

    def send_400_response(self, msg: str) -> None:
        """What is no request is answered here: no handler has been found for it."""
        if self.transport.is_closing():
            return
        status, message = "400 Bad Request", "this is no HTTP request"
        if self._is_too_large:
            status, message = "431 Request Header Fields Too Large", f"more than {MAX_HEADER_BYTES} bytes of headers"
        body = to_json(http_error(int(status[:3]), message).body)
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
        self._wait_for_reader()

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._wait_for_reader()
        elif self._is_receiving and self._request_timer is None and not self.pipeline:
            # Began behind another one: from now on it is read, and not before.
            self._expect_request()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self._abort()
        super().timeout_keep_alive_handler()

    def eof_received(self) -> None:
        # The transport is closed after this.
        self._wait_for_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        # One that is closed waits on, for the last byte.
        if self._reader_timer is not None and not self.transport.is_closing():
            self._reader_timer.cancel()
            self._reader_timer = None
            self._waited_s += max(0.0, self.loop.time() - self._waits_since_s - self._allowed_s)

    def _wait_for_reader(self) -> None:
        """So long as may be for what is written and not sent; closing a transport waits for that without end."""
        if self._reader_timer is not None:
            return
        self._waits_since_s = self.loop.time()
        self._allowed_s = self.transport.get_write_buffer_size() / SLOWEST_BYTES_PER_S
        left_s = self._slow_reader_s - self._waited_s + self._allowed_s
        self._reader_timer = self.loop.call_later(max(0.0, left_s), self._abort)

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _stop_timers(self) -> None:
        for timer in (self._request_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        self._request_timer = self._reader_timer = None
