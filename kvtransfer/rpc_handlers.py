"""Runs every handler of a server. The only place where a handler's exception ends a call.

An exception outside the TandemError tree is a bug: it is logged with its traceback, the client sees INTERNAL "internal
error" and nothing else, and the service goes on.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from engine.errors import InvalidArgument, TandemError
from kvtransfer.rpc import abort_with

# Longer than gRPC takes to cancel a handler whose client is gone; usually it is there at once.
CANCEL_COMES_S = 1.0
END_SETTLES_S = 0.05

_log = logging.getLogger(__name__)

Behaviour = Callable[[Any, Any], Any]
Parse = Callable[[bytes], Any]
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class RpcHandlers(grpc.aio.ServerInterceptor):
    """Runs every handler of a server: parses its requests, writes what it yields, turns what it raises into a status.

    Handlers are coroutines or async generators. A generator is asked for its next message only when the last one was
    accepted by flow control, and is closed, and waited for, when the call ends for whatever reason.
    """

    def __init__(self) -> None:
        self._active: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        return None if handler is None else self._wrap(handler, handler_call_details.method)

    async def drain(self, timeout_s: float) -> None:
        """Waits until no handler runs any more."""
        if self._active:
            await asyncio.wait(self._active, timeout=timeout_s)

    def _wrap(self, handler: Handler, method: str) -> Handler:
        # The request stays raw until it is inside `_reporting`, so that bytes that cannot be parsed are reported too.
        behaviour, parse = _behaviour(handler), handler.request_deserializer

        async def respond(request: Any, context: Context) -> Any:  # noqa: ANN401 - any message of any service
            async with _reporting(self._active, context, method):
                parsed = _ParsedStream(parse, request) if handler.request_streaming else _parsed(parse, request)
                return await _run(behaviour, parsed, context)

        match handler.request_streaming, handler.response_streaming:
            case False, False:
                wrap: Callable[..., Handler] = grpc.unary_unary_rpc_method_handler
            case False, True:
                wrap = grpc.unary_stream_rpc_method_handler
            case True, False:
                wrap = grpc.stream_unary_rpc_method_handler
            case _:
                wrap = grpc.stream_stream_rpc_method_handler
        return wrap(respond, request_deserializer=None, response_serializer=handler.response_serializer)


@asynccontextmanager
async def _reporting(active: set[asyncio.Task[Any]], context: Context, method: str) -> AsyncIterator[None]:
    task = asyncio.current_task()
    assert task is not None, "a handler runs in a task"
    active.add(task)
    try:
        yield
    except TandemError as error:
        await abort_with(error, context)
    except (grpc.aio.BaseError, asyncio.CancelledError):
        # gRPC's own: the handler aborted by itself, or the client is gone.
        raise
    except Exception:
        _log.exception("unexpected error in %s", method)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error")
    finally:
        active.discard(task)


def _behaviour(handler: Handler) -> Behaviour:
    behaviours = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    behaviour: Behaviour = next(behaviour for behaviour in behaviours if behaviour is not None)
    return behaviour


async def _run(behaviour: Behaviour, request: Any, context: Context) -> Any:  # noqa: ANN401 - any message
    if not inspect.isasyncgenfunction(behaviour):
        return await behaviour(request, context)
    async with aclosing(behaviour(request, context)) as responses:
        async for response in responses:
            await _write(response, context)
    return None


async def _write(response: Any, context: Context) -> None:  # noqa: ANN401
    try:
        await context.write(response)
    except grpc.aio.InternalError:
        # The client is gone, and gRPC is about to cancel this task. Were the generator closed before that, the cancel
        # would hit its cleanup.
        await asyncio.sleep(CANCEL_COMES_S)
        raise


def _parsed(parse: Parse | None, raw: bytes) -> Any:  # noqa: ANN401
    try:
        return parse(raw) if parse is not None else raw
    except DecodeError as error:
        raise InvalidArgument("request", raw[:32], "the bytes of a protobuf message of this method") from error


class _ParsedStream:
    # Not a generator: the handler may still be waiting for a request, in a task of its own, when the call ends.
    def __init__(self, parse: Parse | None, requests: AsyncIterator[bytes]) -> None:
        self._parse = parse
        self._requests = requests

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401
        try:
            raw = await anext(self._requests)
        except StopAsyncIteration:
            # The end of the requests looks the same whether the client has no more of them or is gone; in that case
            # the handler must be cancelled while it waits here, not while it already cleans up.
            await asyncio.sleep(END_SETTLES_S)
            raise
        return _parsed(self._parse, raw)
