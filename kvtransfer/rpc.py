"""The one place where errors become gRPC statuses, and statuses errors again.

    server: handler raises TandemError ─▶ interceptor ─▶ abort_with: status + message + trailing metadata
    client: AioRpcError ─▶ error_from_rpc ─▶ the same class with the same attributes

The trailing metadata `tandem-error-bin` is a msgpack map {"class", "message", "fields"[, "of_prefill"]}. A peer that
sends none, or one that cannot be read, still gives a sensible class: the status code alone decides then. Overloaded
also says when to try again as gRPC itself does, in `grpc-retry-pushback-ms`: any client can read it, and one that has
been given a retry policy keeps to it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, NoReturn, TypeVar

import grpc
import grpc.aio
import msgpack

from engine.errors import (
    Cancelled,
    ConfigError,
    CorruptFrame,
    DeadlineExceeded,
    HandedBack,
    InvalidArgument,
    LayoutMismatch,
    ModelFileError,
    NotFound,
    Overloaded,
    PermissionDenied,
    TandemError,
    TransferFailed,
    Unauthenticated,
    Unavailable,
    VersionMismatch,
)

ERROR_KEY = "tandem-error-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# Trailers must stay below 8 KiB in all, and a status message is percent-encoded, which may triple it.
MESSAGE_BYTES_MAX = 1024
FIELD_BYTES_MAX = 512

_STATUS: dict[type[TandemError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    CorruptFrame: grpc.StatusCode.DATA_LOSS,
    LayoutMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    TransferFailed: grpc.StatusCode.ABORTED,
    VersionMismatch: grpc.StatusCode.FAILED_PRECONDITION,
}
# Of two classes with one status it stands for the one that came first.
_CLASS_OF_STATUS = {code: cls for cls, code in _STATUS.items() if cls is not VersionMismatch}
_CLASSES = {cls.__name__: cls for cls in (*_STATUS, HandedBack, ModelFileError, ConfigError, TandemError)}
# The attributes of each class, with what stands in for one that did not arrive.
_FIELDS: dict[type[TandemError], dict[str, str | float]] = {
    InvalidArgument: {"field": "request", "value": "", "expected": ""},
    Overloaded: {"reason": "", "retry_after_s": 1.0},
    DeadlineExceeded: {"phase": "call"},
}

_CODES = {code.value[0]: code for code in grpc.StatusCode}

Message = TypeVar("Message")


def status_of(error: TandemError) -> grpc.StatusCode:
    """The gRPC status of an error; INTERNAL for those without one of their own."""
    return next((_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS), grpc.StatusCode.INTERNAL)


def error_to_bytes(error: TandemError) -> bytes:
    """Class, message and attributes as msgpack, at most some 3 KiB. A class unknown here becomes its nearest base."""
    cls = next(cls for cls in type(error).__mro__ if cls.__name__ in _CLASSES)
    fields = {name: getattr(error, name) for name in _FIELDS.get(cls, {})}
    short = {name: _cut(value, FIELD_BYTES_MAX) if isinstance(value, str) else value for name, value in fields.items()}
    content: dict[str, Any] = {"class": cls.__name__, "message": _cut(str(error), MESSAGE_BYTES_MAX), "fields": short}
    if error.is_of_prefill:
        content["of_prefill"] = True
    packed: bytes = msgpack.packb(content)
    return packed


def error_from_bytes(packed: bytes) -> TandemError | None:
    """What `error_to_bytes` packed; None when it cannot be read."""
    try:
        content = msgpack.unpackb(packed)
        cls, message, fields = _CLASSES[content["class"]], content["message"], content["fields"]
        if not isinstance(message, str):
            return None
        given = {}
        for name, default in _FIELDS.get(cls, {}).items():
            value = fields[name]
            # An int stands for a float, never for a string.
            given[name] = float(value) if isinstance(default, float) else value
            if not isinstance(given[name], type(default)):
                return None
    except (ValueError, TypeError, KeyError, OverflowError, msgpack.UnpackException):
        return None
    error = _rebuild(cls, message, given)
    if content.get("of_prefill") is True:
        error.is_of_prefill = True
    return error


def error_from_status(code: grpc.StatusCode, details: str) -> TandemError:
    """An error from a status alone, as gRPC itself or a foreign server sends it."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        # gRPC reports a message above its limit as exhaustion, but trying again would not help.
        return InvalidArgument("message", details, "a smaller message")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "metadata size exceeds" in details:
        return InvalidArgument("metadata", details, "less metadata: a shorter key or token")
    cls = _CLASS_OF_STATUS.get(code)
    if cls is None:
        return TandemError(f"{code.name}: {details}")
    return _rebuild(cls, details or code.name, {})


def error_from_parts(code: int, message: str, packed: bytes) -> TandemError:
    """An error that came inside a message: the number of its status, its text, what `error_to_bytes` gave."""
    return error_from_bytes(packed) or error_from_status(_CODES.get(code, grpc.StatusCode.UNKNOWN), message)


def error_from_rpc(error: grpc.aio.AioRpcError) -> TandemError:
    """The error that the server raised, as far as it can be known. Never fails."""
    metadata = error.trailing_metadata()
    packed = metadata.get(ERROR_KEY) if metadata is not None else None
    restored = error_from_bytes(packed) if isinstance(packed, bytes) else None
    return restored or error_from_status(error.code(), error.details() or "")


async def abort_with(error: TandemError, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
    """Ends a call on the server's side with `error`."""
    details = _cut(str(error), MESSAGE_BYTES_MAX)
    trailing: list[tuple[str, str | bytes]] = [(ERROR_KEY, error_to_bytes(error))]
    if isinstance(error, Overloaded):
        trailing.append((PUSHBACK_KEY, str(math.ceil(1000 * error.retry_after_s))))
    await context.abort(status_of(error), details, tuple(trailing))
    raise AssertionError("abort always raises")


@asynccontextmanager
async def rpc_errors() -> AsyncIterator[None]:
    """Around a client's awaits on a call: whatever gRPC raises leaves as a TandemError."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    except asyncio.InvalidStateError as error:
        raise Unavailable("the call has ended") from error
    except asyncio.CancelledError as error:
        # gRPC also raises this when the call, not the task, was cancelled: its channel was closed on our side.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Unavailable("the call was closed on this side") from error


class MessageReader(Generic[Message]):
    """The messages of one call, parsed by `parse`. Asks gRPC for the next only when it is asked itself: the reader
    pulls. Whatever ends the call early is raised as a TandemError, again and again if need be; so is what `agree`
    raises, which is awaited with the first."""

    def __init__(
        self,
        rpc: AsyncIterable[bytes],
        parse: Callable[[bytes], Message],
        agree: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._messages = aiter(rpc)
        self._parse = parse
        self._agree = agree
        self._error: TandemError | None = None

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        if self._error is not None:
            raise self._error
        try:
            async with rpc_errors():
                message = await anext(self._messages, None)
                if self._agree is not None:
                    # Not before: a call that was refused has said nothing but why.
                    agree, self._agree = self._agree, None
                    await agree()
            if message is not None:
                return self._parse(message)
        except TandemError as error:
            self._error = error
            raise
        raise StopAsyncIteration


def _rebuild(cls: type[TandemError], message: str, fields: dict[str, Any]) -> TandemError:
    # The constructors build the message out of the fields; here it is there already.
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    for name, default in _FIELDS.get(cls, {}).items():
        setattr(error, name, fields.get(name, default))
    return error


def _cut(text: str, size_max: int) -> str:
    """At most `size_max` bytes of UTF-8, and no half characters."""
    return text.encode("utf-8", "replace")[:size_max].decode("utf-8", "ignore")
