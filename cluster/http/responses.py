"""Answers as HTTP sends them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.http.body import unless_gone
from cluster.openai.answer import DONE, event, to_json
from cluster.openai.errors import ErrorAnswer, error_answer
from engine.errors import Cancelled, TandemError

JSON = "application/json"


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, JSON)


def error_response(error: ErrorAnswer, headers: Mapping[str, str] | None = None) -> Response:
    return json_response(error.body, error.status, {**error.headers, **(headers or {})})


class EventStream(Response):
    """Server-sent events. An error before the first of them has a status of its own; later it is one more event.
    `headers`: of the answer, and of such an error.

    When its client goes away, `events` is closed, and with it whatever computes them: all in one task, the one that
    reads them.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        # Proxies must not wait for more of it.
        super().__init__(b"", 200, {"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._own_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(Cancelled):
            await unless_gone(receive, self._stream(scope, receive, send))

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False
        async with aclosing(self._events) as events:
            try:
                async for each in events:
                    if not has_begun:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        has_begun = True
                    await send({"type": "http.response.body", "body": each, "more_body": True})
            except TandemError as error:
                answer = error_answer(error)
                if not has_begun:
                    await error_response(answer, self._own_headers)(scope, receive, send)
                    return
                await send({"type": "http.response.body", "body": event(answer.body) + DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
