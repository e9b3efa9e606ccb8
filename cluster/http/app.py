"""The gateway's HTTP interface: which path is served by what, who may call it, and how errors are told.

headers ─▶ who calls? ─▶ within their quota of calls? ─▶ body ─▶ handler
              └────────────────┴── no ──▶ 401, 429: nothing of the body is read
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.door import Door
from cluster.gateway import Gateway
from cluster.http.generation import Generation
from cluster.http.metrics_page import MetricsPage
from cluster.http.model_facts import ModelFacts
from cluster.http.openapi import openapi_document
from cluster.http.overview import Overview
from cluster.http.page import Page
from cluster.http.responses import error_response, json_response
from cluster.metrics.exposition import Metrics
from cluster.openai.errors import INTERNAL, error_answer, http_error
from cluster.recorder import Recorder
from cluster.security.caller import Caller
from cluster.tokenize_calls import TokenizeCalls
from engine.errors import Cancelled, TandemError

Handler = Callable[[Request, Caller], Awaitable[Response]]
# What nobody reads: the client has gone. nginx's number for it, for logs of proxies in between.
CLIENT_GONE = 499


def http_app(
    gateway: Gateway,
    door: Door,
    metrics: Metrics,
    recorder: Recorder,
    *,
    max_prompt_chars: int,
    max_body_bytes: int,
    is_ready: Callable[[], bool],
    wall_clock: Callable[[], float],
) -> Starlette:
    """An ASGI application in front of `gateway`. `is_ready`: whether a request that comes now has workers to go to.
    `recorder` is what the page shows of the past. `wall_clock`: seconds since 1970."""
    generation = Generation(gateway, max_body_bytes, wall_clock)
    facts = ModelFacts(gateway, TokenizeCalls(gateway, max_prompt_chars), max_body_bytes, int(wall_clock()))

    document = json_response(openapi_document(gateway.model, asks_who_calls=door.asks_who_calls))

    async def openapi(request: Request) -> Response:
        return document

    overview = Overview(gateway, recorder, is_ready, wall_clock)

    async def health(request: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(request: Request) -> Response:
        if gateway.is_draining:
            return json_response({"status": "draining"}, 503)
        if is_ready():
            return json_response({"status": "ready"})
        return json_response({"status": "no workers"}, 503)

    def behind_the_door(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                caller = door.let_in(request.headers.items())
            except TandemError as error:
                door.tell(error, f"{request.client.host}:{request.client.port}" if request.client else "?")
                raise
            return await handler(request, caller)

        return endpoint

    return Starlette(
        routes=[
            Route("/v1/chat/completions", behind_the_door(generation.chat), methods=["POST"]),
            Route("/v1/completions", behind_the_door(generation.completions), methods=["POST"]),
            Route("/v1/models", behind_the_door(facts.models), methods=["GET"]),
            Route("/v1/models/{model:path}", behind_the_door(facts.model), methods=["GET"]),
            Route("/tokenize", behind_the_door(facts.tokenize), methods=["POST"]),
            Route("/detokenize", behind_the_door(facts.detokenize), methods=["POST"]),
            Route("/metrics", behind_the_door(MetricsPage(metrics).get), methods=["GET"]),
            Route("/", Page().page, methods=["GET"]),
            Route("/tandem/v1/overview", behind_the_door(overview.cluster), methods=["GET"]),
            Route("/tandem/v1/requests", behind_the_door(overview.requests), methods=["GET"]),
            Route("/tandem/v1/request", behind_the_door(overview.request), methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/ready", ready, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
        ],
        exception_handlers={TandemError: _refused, HTTPException: _not_served, Exception: _crashed},
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError), "handlers are chosen by class"
    if isinstance(error, Cancelled):
        return Response(status_code=CLIENT_GONE)
    # What its logs and traces know it by, as far as it came.
    request_id = getattr(request.state, "request_id", "")
    return error_response(error_answer(error), {"x-request-id": request_id} if request_id else None)


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "handlers are chosen by class"
    response = error_response(http_error(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
    response.headers.update(error.headers or {})
    return response


async def _crashed(request: Request, error: Exception) -> Response:
    """A bug. Starlette raises it again after this, and uvicorn logs it with where it came from."""
    return error_response(INTERNAL)
