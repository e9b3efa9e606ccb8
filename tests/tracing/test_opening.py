"""Where traces go, whether they may, and what becomes of them when nobody takes them."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.config import load
from cluster.environment import OtelEnvironment, read_otel_environment
from cluster.tracing.opening import BATCH_SPANS, make_sampler, open_sink
from cluster.tracing.span import Span
from cluster.tracing.tracing_config import TracingConfig
from engine.errors import ConfigError
from engine.trace_context import TraceContext
from tests.tracing.otlp_receiver import receiving

TRACE = TraceContext(1 << 100, 1 << 50, True, "a=1")
ROOT = Path(__file__).parents[2]
# Hangs' guard.
LONG_S = 60.0


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def spans(count: int) -> list[Span]:
    return [Span("decode", TRACE.child("decode", number), 1.0, 2.0) for number in range(count)]


async def test_spans_reach_the_collector_when_their_process_ends() -> None:
    with receiving() as receiver:
        async with open_sink(TracingConfig(endpoint=receiver.endpoint), "decode-3") as sink:
            assert sink is not None
            more = {"tandem.preemptions": 2}
            own = Span("decode worker", TRACE, 1.0, 3.0, "server", more, "Unavailable", "it is gone")
            sink.write([own, *spans(1)])
        [(process, outer), (_, inner)] = receiver.spans
    assert (process["service.name"], process["service.instance.id"]) == ("tandem", "decode-3")
    assert (outer.name, inner.name) == ("decode worker", "decode")
    assert outer.trace_id == inner.trace_id == TRACE.trace_id.to_bytes(16, "big")
    assert outer.span_id == inner.parent_span_id == TRACE.span_id.to_bytes(8, "big")
    assert outer.parent_span_id == b""
    assert outer.end_time_unix_nano - outer.start_time_unix_nano == 2_000_000_000
    assert (outer.status.code, outer.status.message) == (2, "it is gone")
    assert {each.key for each in outer.attributes} == {"tandem.preemptions", "error.type"}


async def test_a_collector_that_hangs_holds_nobody_up_and_few_spans() -> None:
    with receiving() as receiver:
        receiver.goes_on.clear()
        config = TracingConfig(endpoint=receiver.endpoint, max_queued_spans=BATCH_SPANS)
        async with asyncio.timeout(LONG_S), open_sink(config, "p") as sink:
            assert sink is not None
            sink.write(spans(BATCH_SPANS))
            await asyncio.to_thread(receiver.has_call.wait, LONG_S)
            sink.write(spans(20 * BATCH_SPANS))
            receiver.goes_on.set()
        # One batch under way, and one queue.
        assert 0 < len(receiver.spans) <= 2 * BATCH_SPANS


async def test_a_collector_that_is_not_there_holds_nobody_up() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        config = TracingConfig(endpoint=f"http://127.0.0.1:{nobody.getsockname()[1]}")
        async with asyncio.timeout(LONG_S), open_sink(config, "p") as sink:
            assert sink is not None
            sink.write(spans(3))


async def test_a_collector_that_never_answers_does_not_keep_a_process_from_ending() -> None:
    with receiving() as receiver:
        receiver.goes_on.clear()
        async with asyncio.timeout(LONG_S), open_sink(TracingConfig(endpoint=receiver.endpoint), "p") as sink:
            assert sink is not None
            sink.write(spans(3))
        assert receiver.has_call.is_set()
        assert receiver.spans == []


async def test_without_an_endpoint_there_is_nothing() -> None:
    threads = threading.active_count()
    async with open_sink(TracingConfig(), "p") as sink:
        assert sink is None
    assert make_sampler(TracingConfig(), random.Random(1)) is None
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("variables", "is_traced"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_standards_variables_count_where_the_file_says_nothing(
    variables: dict[str, str], is_traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (make_sampler(TracingConfig(), random.Random(1)) is not None) is is_traced
    assert make_sampler(TracingConfig(endpoint=""), random.Random(1)) is None
    is_off = read_otel_environment().is_disabled
    assert (make_sampler(TracingConfig(endpoint="http://d:1"), random.Random(1)) is None) is is_off


@pytest.mark.parametrize(
    ("sampler", "argument", "ratio"),
    [
        ("", "", 1.0),
        ("", "0.5", 1.0),
        ("parentbased_traceidratio", "0", 0.0),
        ("traceidratio", "", 1.0),
        ("always_on", "0", 1.0),
        ("parentbased_always_off", "", 0.0),
    ],
)
def test_the_share_that_the_variables_ask_for(
    sampler: str, argument: str, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    made = make_sampler(TracingConfig(endpoint="http://c:1"), random.Random(1))
    assert made is not None
    assert {made.begin(None).is_sampled for _ in range(50)} == {bool(ratio)}
    own = make_sampler(TracingConfig(endpoint="http://c:1", sample_ratio=1 - ratio), random.Random(1))
    assert own is not None
    assert {own.begin(None).is_sampled for _ in range(50)} == {not ratio}, "the file counts before them"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: got 'http/protobuf', expected grpc",
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317",
                "OTEL_TRACES_SAMPLER": "traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": "half",
            },
            "OTEL_TRACES_SAMPLER_ARG: got 'half', expected a number",
        ),
    ],
)
def test_variables_that_cannot_be(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        make_sampler(TracingConfig(), random.Random(1))
    assert make_sampler(TracingConfig(endpoint=""), random.Random(1)) is None, "they matter to nobody then"


def test_nobody_is_asked_what_the_variables_are() -> None:
    assert read_otel_environment({}) == OtelEnvironment()


@pytest.mark.parametrize("endpoint", ["collector:4317", "http://collector", "ftp://collector:1", "http://collector:x"])
def test_an_endpoint_that_is_none(endpoint: str, tmp_path) -> None:
    path = tmp_path / "tandem.yaml"
    path.write_text(f"tracing:\n  endpoint: {endpoint}\n")
    with pytest.raises(ConfigError, match=r"tandem.yaml:2: tracing.endpoint: got .*, expected: http://HOST:PORT or"):
        load(path)


# In a process of its own: this one has loaded OpenTelemetry.
IMPORTED = """
import asyncio, sys
import cluster.gateway_process, cluster.worker_process, cluster.http.app
from cluster.tracing.opening import open_sink
from cluster.tracing.tracing_config import TracingConfig

async def main():
    async with open_sink(TracingConfig(), "p"):
        print([name for name in sys.modules if name.startswith("opentelemetry")])

asyncio.run(main())
"""
MISSING = """
import asyncio, sys
sys.modules["opentelemetry.exporter.otlp.proto.grpc.trace_exporter"] = None
from cluster.tracing.opening import open_sink
from cluster.tracing.tracing_config import TracingConfig
from engine.errors import ConfigError

async def main():
    async with open_sink(TracingConfig(endpoint="http://c:1"), "p"):
        pass

try:
    asyncio.run(main())
except ConfigError as error:
    print(error)
"""


def said(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "proto")))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_of_opentelemetry_is_loaded_where_nothing_is_traced() -> None:
    assert said(IMPORTED) == "[]"


def test_who_asks_for_traces_without_the_packages_is_told_which() -> None:
    assert "tracing.endpoint: opentelemetry.exporter" in (text := said(MISSING))
    assert "expected tandem-serving[tracing]" in text
