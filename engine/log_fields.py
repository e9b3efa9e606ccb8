"""What log lines say beside their text, which cluster/logs/ writes down, and what they may say of errors."""

from __future__ import annotations

from engine.errors import InvalidArgument, NotFound, TandemError
from engine.trace_context import TraceContext

# The attribute of a log record that holds them.
FIELDS = "tandem_fields"


def about(request_id: str, trace: TraceContext | None, **more: object) -> dict[str, dict[str, object]]:
    """`extra` of a logger's call, for lines about one request: its id, its trace where it has one, and `more`."""
    fields: dict[str, object] = {"request_id": request_id} if request_id else {}
    if trace is not None:
        fields["trace_id"] = trace.trace_id_hex
    return {FIELDS: {**fields, **more}}


def told(error: BaseException) -> str:
    """What a log or a trace may say of an error: without what a client wrote, and without a bug's own words."""
    if isinstance(error, InvalidArgument):
        return f"{error.field} is not as it should be"
    if isinstance(error, TandemError) and not isinstance(error, NotFound):
        return str(error)
    return type(error).__name__
