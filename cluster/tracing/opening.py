"""Whether and where traces go, by the configuration and, where that says nothing, by OpenTelemetry's variables.

Nothing of OpenTelemetry is loaded where they go nowhere.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cluster.environment import OtelEnvironment, read_otel_environment
from cluster.tracing.sampler import Sampler
from cluster.tracing.span import Sink
from cluster.tracing.tracing_config import TracingConfig
from engine.errors import ConfigError

if TYPE_CHECKING:
    from cluster.tracing.span_writer import SpanWriter

# Spans that are sent at once.
BATCH_SPANS = 512


@asynccontextmanager
async def open_sink(config: TracingConfig, process: str) -> AsyncIterator[Sink | None]:
    """Where the spans of `process` go while the context lasts; None: nowhere. Leaving it takes a few seconds at most.
    Raises ConfigError where they should go somewhere and cannot."""
    if not _wants_traces(config, read_otel_environment()):
        yield None
        return
    # Loading takes a second, and a worker's loop may turn already.
    writer = await asyncio.to_thread(_open, config, process)
    try:
        yield writer
    finally:
        await writer.close()


def make_sampler(config: TracingConfig, rng: random.Random) -> Sampler | None:
    """Says which requests are traced; None where traces go nowhere. Raises ConfigError."""
    environment = read_otel_environment()
    if not _wants_traces(config, environment):
        return None
    return Sampler(_ratio(environment) if config.sample_ratio is None else config.sample_ratio, rng)


def _wants_traces(config: TracingConfig, environment: OtelEnvironment) -> bool:
    if config.endpoint is not None:
        return bool(config.endpoint) and not environment.is_disabled
    if not environment.endpoint or environment.is_disabled:
        return False
    if environment.protocol not in ("", "grpc"):
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL: got {environment.protocol!r}, expected grpc")
    return True


def _ratio(environment: OtelEnvironment) -> float:
    """What the variables say, 1.0 where they say nothing."""
    sampler, text = environment.sampler.removeprefix("parentbased_"), environment.sampler_arg
    if sampler == "always_off":
        return 0.0
    if sampler != "traceidratio" or not text:
        return 1.0
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ConfigError(f"OTEL_TRACES_SAMPLER_ARG: got {text!r}, expected a number in [0, 1]")
    return ratio


def _open(config: TracingConfig, process: str) -> SpanWriter:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from cluster.tracing.span_writer import SpanWriter
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint: {error.name} is not installed, expected tandem-serving[tracing]; or '' for no traces"
        ) from error
    # Without one the exporter takes the variables' own.
    exporter = OTLPSpanExporter(config.endpoint or None)
    processor = BatchSpanProcessor(exporter, config.max_queued_spans, max_export_batch_size=BATCH_SPANS)
    return SpanWriter(processor, exporter, process)
