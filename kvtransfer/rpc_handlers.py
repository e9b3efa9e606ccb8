"""Runs every handler of a server, within the limits of its service. The only place where a handler's exception ends a
call.

    admitted? ─▶ the request, whole, within request_s ─▶ handler ─▶ each message taken within write_s ─▶ end
        └──────────────── all of it within age_s ──────────────────────────────────────────────────────┘

An exception outside the TandemError tree is a bug: it is logged with its traceback, the client sees INTERNAL "internal
error" and nothing else, and the service goes on.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from engine.errors import DeadlineExceeded, InvalidArgument, Overloaded, PermissionDenied, TandemError
from engine.refusal_log import RefusalLog
from kvtransfer.rpc import abort_with
from kvtransfer.rpc_call_tasks import CallTasks
from kvtransfer.rpc_limits import CallLimits, PortLimits
from kvtransfer.rpc_version import SPOKEN, Versions, agree_with_caller

# Longer than gRPC takes to cancel a handler whose client is gone; usually it is there at once.
CANCEL_COMES_S = 1.0
END_SETTLES_S = 0.05
CERT_NAMES = "x509_subject_alternative_name"
# How long a status waits for a reader that stopped, where its service says nothing of readers: one that reads on by
# then learns why its call has ended.
STATUS_S = 10.0
# Of a reader that counts as reading.
SLOWEST_BYTES_PER_S = 1024
# Calls of the health service that are taken beyond the limit of calls: a server that is full is still alive.
HEALTH = "grpc.health.v1.Health"
HEALTH_CALLS = 64
# Of any other service than the server's own: it is the standard's, and says nothing of limits.
STANDARD_LIMITS = CallLimits(write_s=30.0, age_s=3600.0)

_log = logging.getLogger(__name__)

Behaviour = Callable[[Any, Any], Any]
Parse = Callable[[bytes], Any]
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class ServiceRules:
    """What holds for the calls of one service: how long they may take; where callers show certificates, what theirs
    must name, "" for anything; and whether callers are other parts of Tandem, with which a version of the protocol is
    agreed before anything else (rpc_version.py)."""

    limits: CallLimits
    caller: str = ""
    is_internal: bool = False


STANDARD_RULES = ServiceRules(STANDARD_LIMITS)


class RpcHandlers(grpc.aio.ServerInterceptor):
    """Runs every handler of a server: parses its requests, writes what it yields, turns what it raises into a status.

    Handlers are coroutines or async generators. A generator is asked for its next message only when the last one was
    accepted by flow control, and is closed, and waited for, when the call ends for whatever reason. `rules` are those
    of the services, by their full names; `spoken` the versions of the protocol between parts of Tandem. Belongs to the
    running loop.
    """

    def __init__(self, port: PortLimits, rules: Mapping[str, ServiceRules], spoken: Versions = SPOKEN) -> None:
        self._port = port
        self._rules = rules
        self._spoken = spoken
        self._loop = asyncio.get_running_loop()
        self._tasks = CallTasks.of(self._loop)
        self._refusals = RefusalLog()
        self._active: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        try:
            handler = await continuation(handler_call_details)
        except Exception:
            # What chooses a handler for each call has a bug: gRPC itself would tell the client all about it.
            _log.exception("unexpected error in %s", handler_call_details.method)
            handler = refusal(TandemError("internal error"))
        return None if handler is None else self._wrap(handler, handler_call_details)

    async def drain(self, timeout_s: float) -> None:
        """Waits until no handler runs any more."""
        if self._active:
            await asyncio.wait(self._active, timeout=timeout_s)

    def _wrap(self, handler: Handler, details: grpc.HandlerCallDetails) -> Handler:
        _, service, _ = details.method.split("/", 2)
        rules = self._rules.get(service, STANDARD_RULES)
        limits = rules.limits
        behaviour, parse = _behaviour(handler), handler.request_deserializer

        # Requests are read from the context: gRPC's iterator over them would hold the call beyond its end.
        async def respond(_: object, context: Context) -> None:
            async with self._reporting(context, details.method, limits.write_s or STATUS_S):
                self._admit(service, details, context)
                if rules.caller:
                    _check_caller(context, rules.caller, service)
                if rules.is_internal:
                    await agree_with_caller(context, self._spoken, details.method)
                stream = _ParsedStream(parse, context)
                async with _within(limits.age_s, "the call"):
                    # The request stays raw until it is in here, so that bytes that cannot be parsed are reported too.
                    request = stream if handler.request_streaming else await _whole(stream, limits.request_s)
                    answers = _Answers(context, limits.write_s)
                    response = await _run(behaviour, request, context, answers)
                    if not handler.response_streaming:
                        await answers.write(response)

        # Whatever the method's kind: to gRPC it is one whose requests are asked for, and whose answers are written,
        # here, so that the limits hold for all of them.
        return grpc.stream_stream_rpc_method_handler(
            respond, request_deserializer=None, response_serializer=handler.response_serializer
        )

    def _admit(self, service: str, details: grpc.HandlerCallDetails, context: Context) -> None:
        """Raises Overloaded. This call is one of the active ones."""
        room = self._port.calls + (HEALTH_CALLS if service == HEALTH else 0)
        if len(self._active) > room:
            full = Overloaded(f"{room} calls are open here already")
            self._tell(context, f"{details.method} was refused", str(full))
            raise full
        # gRPC refuses such a call itself, but not on a connection that is so new that its limits do not count yet.
        size = sum(len(key) + len(value) for key, value in details.invocation_metadata)
        if size > self._port.metadata_bytes:
            raise InvalidArgument("metadata", f"{size} bytes", f"at most {self._port.metadata_bytes}")

    @asynccontextmanager
    async def _reporting(self, context: Context, method: str, status_s: float) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None, "a handler runs in a task"
        self._active.add(task)
        try:
            yield
        except TandemError as error:
            match error:
                case InvalidArgument(field=field, expected=expected):
                    # Without what was sent: that is nobody's business here.
                    self._tell(context, f"{method} was refused", f"{field}: expected {expected}")
                case PermissionDenied():
                    self._tell(context, f"{method} was refused", str(error))
            await self._end(abort_with(error, context), task, status_s)
        except _CutOff as cut:
            self._tell(context, f"{method} was cut off", str(cut.error))
            await self._end(abort_with(cut.error, context), task, status_s)
        except (grpc.aio.BaseError, asyncio.CancelledError):
            # gRPC's own: the handler aborted by itself, or the client is gone.
            raise
        except Exception:
            _log.exception("unexpected error in %s", method)
            await self._end(context.abort(grpc.StatusCode.INTERNAL, "internal error"), task, status_s)
        finally:
            self._active.discard(task)

    async def _end(self, abort: Awaitable[NoReturn], task: asyncio.Task[Any], limit_s: float) -> NoReturn:
        try:
            async with asyncio.timeout(limit_s):
                await abort
        except TimeoutError:
            # It waits behind a message that nobody reads.
            self._tasks.let_go(task)
            raise asyncio.CancelledError from None
        except grpc.aio.InternalError:
            # There is nobody any more.
            raise asyncio.CancelledError from None

    def _tell(self, context: Context, problem: str, detail: str) -> None:
        line = self._refusals.line(context.peer(), problem, self._loop.time(), detail)
        if line is not None:
            _log.warning("%s", line)


class _CutOff(Exception):
    """A call took longer than it may. `error` is what the caller is told."""

    def __init__(self, error: TandemError) -> None:
        super().__init__(str(error))
        self.error = error


def refusal(error: TandemError, notice: Callable[[str], None] | None = None) -> Handler:
    """A handler that ends a call of any method with `error`, and leaves its request unread: however large that is, it
    is not taken in. `notice` gets the address that the call came from."""

    async def refuse(requests: AsyncIterator[bytes], context: Context) -> None:
        if notice is not None:
            notice(context.peer())
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)


@asynccontextmanager
async def _within(seconds: float | None, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise _CutOff(DeadlineExceeded(f"{what}, which may take {seconds:g} s")) from None


def _check_caller(context: Context, caller: str, service: str) -> None:
    """The connection has shown a certificate that can be trusted; whether it is one for this service, it says."""
    names = [name.decode("utf-8", "replace") for name in context.auth_context().get(CERT_NAMES, ())]
    if caller not in names:
        raise PermissionDenied(f"{service} is for callers with a certificate for {caller}, not for {', '.join(names)}")


def _behaviour(handler: Handler) -> Behaviour:
    behaviours = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    behaviour: Behaviour = next(behaviour for behaviour in behaviours if behaviour is not None)
    return behaviour


async def _whole(requests: AsyncIterator[Any], limit_s: float | None) -> Any:  # noqa: ANN401 - any message
    """The request of a call that has one."""
    async with _within(limit_s, "the request's arrival"):
        async for request in requests:
            return request
    raise InvalidArgument("request", "none", "one message")


async def _run(behaviour: Behaviour, request: Any, context: Context, answers: _Answers) -> Any:  # noqa: ANN401
    if not inspect.isasyncgenfunction(behaviour):
        return await behaviour(request, context)
    async with aclosing(behaviour(request, context)) as responses:
        async for response in responses:
            await answers.write(response)
    return None


class _Answers:
    """The messages of one call to its caller, who may keep them waiting for `limit_s` in all. What is taken gives some
    of that back, so that a slow link has its time, and who takes a word now and then has not."""

    def __init__(self, context: Context, limit_s: float | None) -> None:
        self._context = context
        self._limit_s = self._left_s = limit_s
        self._has_begun = False

    async def write(self, response: Any) -> None:  # noqa: ANN401
        now = asyncio.get_running_loop().time
        start_s = now()
        try:
            async with asyncio.timeout(self._left_s):
                await self._write(response)
        except TimeoutError:
            raise _CutOff(Overloaded(f"the answer was not read for {self._limit_s:g} s")) from None
        except grpc.aio.InternalError:
            # The client is gone, and gRPC is about to cancel this task. Were the generator closed before that, the
            # cancel would hit its cleanup.
            await asyncio.sleep(CANCEL_COMES_S)
            raise
        if self._limit_s is not None and self._left_s is not None:
            size = len(response) if isinstance(response, bytes) else response.ByteSize()
            self._left_s = min(self._limit_s, self._left_s + size / SLOWEST_BYTES_PER_S - (now() - start_s))

    async def _write(self, response: Any) -> None:  # noqa: ANN401
        if not self._has_begun:
            self._has_begun = True
            # Not with the message, as gRPC would: while that waits they would too, and no status could follow.
            with suppress(grpc.aio.UsageError):  # the handler has done so
                await self._context.send_initial_metadata(())
        await self._context.write(response)


def _parsed(parse: Parse | None, raw: bytes) -> Any:  # noqa: ANN401
    try:
        return parse(raw) if parse is not None else raw
    except DecodeError as error:
        raise InvalidArgument("request", raw[:32], "the bytes of a protobuf message of this method") from error


class _ParsedStream:
    # Not a generator: the handler may still be waiting for a request, in a task of its own, when the call ends.
    def __init__(self, parse: Parse | None, context: Context) -> None:
        self._parse = parse
        self._context = context

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401
        raw = await self._context.read()
        if raw is grpc.aio.EOF:
            # The end of the requests looks the same whether the client has no more of them or is gone; in that case
            # the handler must be cancelled while it waits here, not while it already cleans up.
            await asyncio.sleep(END_SETTLES_S)
            raise StopAsyncIteration
        return _parsed(self._parse, raw)
