"""Trace contexts as others send them, and those that are handed on."""

import pytest
from opentelemetry.trace import TraceState

from engine.trace_context import MAX_STATE_CHARS, MAX_STATE_MEMBERS, TraceContext, read_trace, trace_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


def test_what_was_read_is_written_as_it_was() -> None:
    trace = read_trace(PARENT, "a=1,b=2")
    assert trace == TraceContext(int(TRACE, 16), int(SPAN, 16), True, "a=1,b=2")
    assert trace.headers == (("traceparent", PARENT), ("tracestate", "a=1,b=2"))
    assert trace.trace_id_hex == TRACE
    unsampled = read_trace(f"00-{TRACE}-{SPAN}-00")
    assert unsampled is not None
    assert not unsampled.is_sampled
    assert unsampled.headers == (("traceparent", f"00-{TRACE}-{SPAN}-00"),)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        PARENT.upper(),
        f"00-{TRACE}-{SPAN}",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE}-{SPAN}-٠١",
    ],
)
def test_what_is_no_context_is_none(header: str) -> None:
    assert read_trace(header) is None


def test_a_later_version_may_say_more() -> None:
    assert read_trace(f"01-{TRACE}-{SPAN}-01-more") == read_trace(PARENT)
    # Only one of its flags is known.
    assert read_trace(f"00-{TRACE}-{SPAN}-fe") == read_trace(f"00-{TRACE}-{SPAN}-00")


@pytest.mark.parametrize(
    "state",
    [
        f"a={'x' * (MAX_STATE_CHARS - 1)}",
        ",".join(f"k{number}=1" for number in range(MAX_STATE_MEMBERS + 1)),
        *("a=\x00", "a=é", "a=\t1", "a=1\n"),
        *("a", "a=", "=1", "a=1=2", "A=1", "a b=1", "@a=1", "a@=1", "1=1", "a=1,a=2"),
        *(f"a={'x' * 257}", f"{'a' * 257}=1", f"a@{'b' * 15}=1"),
        "any words, of any kind",
    ],
)
def test_a_state_that_cannot_be_passed_on_is_dropped_and_the_trace_goes_on(state: str) -> None:
    assert read_trace(PARENT, state) == read_trace(PARENT)


@pytest.mark.parametrize(
    "state",
    [
        *("a=1", " a=1 , b=2", "a=1,,b=2", "a= !~", "1a@b=x", "vendor_0-*/=x y;z", f"a@{'b' * 14}=1"),
        f"{'a' * 256}={'x' * 255}",
        ",".join(f"k{number}=1" for number in range(MAX_STATE_MEMBERS)),
    ],
)
def test_a_state_is_passed_on_as_it_is(state: str, caplog: pytest.LogCaptureFixture) -> None:
    trace = read_trace(PARENT, state)
    assert trace is not None
    assert trace.state == state
    # Who makes spans of it has nothing to complain of.
    assert TraceState.from_header([state])
    assert not caplog.records


def test_headers_of_a_call() -> None:
    headers = [("accept", "*/*"), ("traceparent", f" {PARENT} "), ("tracestate", "a=1"), ("tracestate", "b=2")]
    assert trace_of(headers) == read_trace(PARENT, "a=1,b=2")
    assert trace_of([("accept", "*/*"), ("traceparent-bin", b"x")]) is None
    assert trace_of([("traceparent", PARENT), ("traceparent", PARENT)]) is None, "nobody knows which"


def test_ids_of_inner_spans_follow_from_what_they_are() -> None:
    trace = read_trace(PARENT, "a=1")
    assert trace is not None
    pull = trace.child("attempt").child("pull")
    assert pull == trace.child("attempt").child("pull"), "by whoever asks"
    assert (pull.trace_id, pull.is_sampled, pull.state) == (trace.trace_id, True, "a=1")
    assert pull.parent_id == trace.child("attempt").span_id
    others = {trace.child("attempt", number).span_id for number in range(1000)}
    assert len(others | {trace.span_id, pull.span_id, trace.child("route").span_id}) == 1003
