"""Errors as clients of OpenAI's interface know them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engine.errors import (
    ContextExceeded,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Overloaded,
    PermissionDenied,
    TandemError,
    Unauthenticated,
    Unavailable,
)

# How soon to come again where nobody knows better.
RETRY_S = 1.0
INVALID = "invalid_request_error"


class BodyTooLarge(InvalidArgument):
    """More than a request may hold; the rest was not read."""

    def __init__(self, size: int, max_bytes: int) -> None:
        super().__init__("body", f"{size} bytes", f"at most {max_bytes}")


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """`retry_after_s` None: trying again would not help, or nobody can say when."""

    status: int
    body: dict[str, Any]
    retry_after_s: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            # Whole seconds are all that the header may hold; the other is read by OpenAI's own clients.
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
            headers["retry-after-ms"] = str(math.ceil(1e3 * self.retry_after_s))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def error_answer(error: TandemError) -> ErrorAnswer:
    """What a client is told. Of errors that are no business of its own, nothing but that there was one: who runs
    this side has the rest, beside the request's id."""
    match error:
        case BodyTooLarge():
            return ErrorAnswer(413, _body(str(error), INVALID, None))
        case InvalidArgument():
            code = "context_length_exceeded" if isinstance(error, ContextExceeded) else None
            return ErrorAnswer(400, _body(str(error), INVALID, code, error.field))
        case Unauthenticated():
            return ErrorAnswer(401, _body(str(error), INVALID, "invalid_api_key"))
        case PermissionDenied():
            return ErrorAnswer(403, _body(str(error), "permission_error", None))
        case NotFound():
            return ErrorAnswer(404, _body(str(error), INVALID, "model_not_found", "model"))
        case Overloaded():
            return ErrorAnswer(429, _body(str(error), "rate_limit_error", "rate_limit_exceeded"), error.retry_after_s)
        case DeadlineExceeded():
            return ErrorAnswer(504, _body(str(error), "timeout_error", "deadline_exceeded"))
        case Unavailable():
            return ErrorAnswer(503, _body(str(error), "service_unavailable_error", "unavailable"), RETRY_S)
        case _:
            return INTERNAL


def http_error(status: int, message: str) -> ErrorAnswer:
    """What HTTP itself has to say: no such path, no such method."""
    return ErrorAnswer(status, _body(message, INVALID, None))


INTERNAL = ErrorAnswer(
    500, {"error": {"message": "internal error", "type": "server_error", "param": None, "code": None}}
)


def _body(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
