"""gRPC methods for clients: who calls is asked, and counted, before a request is read.

    metadata ─▶ who calls? ─▶ within their quota of calls? ─▶ the request is read ─▶ handler
                     └────────────────┴──── no ──▶ refused

What is refused stays with its sender, however large it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from cluster.door import Door
from cluster.security.caller import Caller
from engine.errors import TandemError
from kvtransfer.rpc_handlers import refusal
from kvtransfer.rpc_server import Chooser, Handler, Metadata


def guarded(door: Door, handlers: Mapping[str, Callable[[Caller], Handler]]) -> dict[str, Handler | Chooser]:
    """By method: what makes its handler for a caller, once `door` has let them in."""

    def choose(method: str, metadata: Metadata) -> Handler:
        try:
            caller = door.let_in(metadata)
        except TandemError as error:
            return refusal(error, partial(door.tell, error))
        return handlers[method](caller)

    return {method: partial(choose, method) for method in handlers}


def unary(behaviour: Any, request: type[Message]) -> Handler:  # noqa: ANN401 - a coroutine function
    """A method with one request, of that type, and one response."""
    return grpc.unary_unary_rpc_method_handler(
        behaviour, request_deserializer=request.FromString, response_serializer=to_bytes
    )


def to_bytes(message: Message) -> bytes:
    return message.SerializeToString()
